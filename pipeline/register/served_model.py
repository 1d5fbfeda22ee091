"""The registered model: what MLflow loads and serves, from code and safetensors, no pickle.

This file and the package `vae` travel with the weights; nothing else of the project is needed.
One task for each call, by the parameter `task`:

    score        x -> DataFrame: log_px, se, ess, khat, bits_per_dim, percentile, reason
    encode       x -> {"mean": (B, L), "std": (B, L)} of q(z|x)
    decode       z -> (B, *data_shape), the mean of p(x|z)
    reconstruct  x -> (B, *data_shape), the mean of p(x|z) at the mean of q(z|x)
    sample       -> (num_samples, *data_shape), x ~ p(x|z), z ~ p(z)

An example's score depends on the example, K and the seed alone, not on its neighbours in a batch:
its noise is seeded by its content. One that can't be scored gets no figures, and the reason why;
its neighbours get theirs. Shapes: B examples, L latent values, K importance samples, D
data values. Nats, but for bits_per_dim.
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import numpy as np
import pandas as pd
import torch
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc.model import PythonModel
from torch import Tensor

from vae.evidence import EvidenceSettings, seeded_sample, standard_normal
from vae.models import VAE, load

TASKS = ("score", "encode", "decode", "reconstruct", "sample")
PARAMETERS = ("task", "num_samples", "seed")
MOST_SAMPLES = 100_000
MOST_DRAWS = 2**21  # B x K of one call: about a minute of a small model on two cores
MOST_VALUES = 2**24  # of the input and of the answer
MOST_BYTES = 2**25  # of a served request's body, before it is parsed
DEFAULT_IMAGES = 16
MOMENT_SAMPLES = 1000  # for the moments of a posterior that has none in closed form

LARGEST = 1e100  # beyond, a square is no number
TOO_FAR = "log p(x) is lower than its smallest number: it lies too far from the training data"

_sampling = threading.Lock()  # torch's distributions draw from one global generator


class ScoredVAE(PythonModel):
    """A VAE behind MLflow's pyfunc interface."""

    def load_context(self, context: Any) -> None:
        """Read weights and configuration, refusing damaged ones by their hash."""
        folder = Path(context.artifacts["weights"]).parent
        self.model: VAE = load(folder)
        reference = json.loads((folder / "reference.json").read_text())
        self.reference_log_px = np.asarray(reference["log_px"])
        self.reference_percent = 100 * np.asarray(reference["probabilities"])
        self.settings = EvidenceSettings.of(reference)  # those of the quantiles
        data = json.loads((folder / "data.json").read_text())
        self.columns: list[str] | None = data["columns"]
        self.filled: dict[str, float] = data.get("filled") or {}  # for missing values
        check_parameters_ourselves()
        bound_requests()

    def predict(
        self, context: Any, model_input: np.ndarray, params: dict[str, Any] | None = None
    ) -> Any:
        """Answer one task.

        model_input: x, an array of (B, *data_shape), (B, D) or one example, in data units (0/1,
        0…255, raw), or a DataFrame: of a table by its columns' names, in any order and beside
        others, else with D columns; for `decode` z, (B, L); unused for `sample`.
        params: task (default score); num_samples: K for `score` (default: that of the reference
        quantiles), how many for `sample` (16); seed (for `score` that of the quantiles, else 0).
        Raises MlflowException, in a sentence, for anything else.
        """
        chosen = checked_parameters(params)
        task, seed = chosen["task"], chosen["seed"] or 0
        if task == "sample":
            return self._sample(chosen["num_samples"] or DEFAULT_IMAGES, seed)
        if task == "decode":
            return self._decode(_all_finite(to_array(model_input)))
        x = self._to_data(to_array(self._in_order(model_input)))
        if task == "score":
            asked = {"num_samples": chosen["num_samples"], "seed": chosen["seed"]}
            given = {name: value for name, value in asked.items() if value is not None}
            return self._score(x, replace(self.settings, **given))
        _all_finite(x.numpy())
        mean, std = self._moments(x, seed)
        if task == "encode":
            return {"mean": mean.numpy(), "std": std.numpy()}
        return self._mean_of(mean)

    def _score(self, x: Tensor, settings: EvidenceSettings) -> pd.DataFrame:
        num_samples = settings.num_samples
        if len(x) * num_samples > MOST_DRAWS:
            raise refusal(
                f"{len(x):,} examples with {num_samples:,} samples each are more than a call takes "
                f"({MOST_DRAWS:,} in all); send fewer examples at a time, or lower num_samples"
            )
        reasons = self._faults(x)
        whole = np.array([reason is None for reason in reasons])
        names = ("log_px", "se", "ess", "khat")
        table = pd.DataFrame(np.nan, index=range(len(x)), columns=list(names))
        if whole.any():
            table.loc[whole] = self._estimates(x[torch.from_numpy(whole)], settings, names)
        lost = whole & ~np.isfinite(table["log_px"].to_numpy())
        table.loc[lost] = np.nan
        # inf, where a tail is heavier than floats can hold, is no JSON; nor is it a number
        table = table.mask(np.isinf(table), np.nan)
        if self.model.config.space != "continuous":
            table["bits_per_dim"] = -table["log_px"] / (x[0].numel() * math.log(2))
        table["percentile"] = np.interp(
            table["log_px"], self.reference_log_px, self.reference_percent
        )
        table["reason"] = pd.Series(
            [TOO_FAR if far else reason for far, reason in zip(lost, reasons, strict=True)],
            dtype=object,
        )
        return _json_safe(table)

    def _estimates(
        self, x: Tensor, settings: EvidenceSettings, names: tuple[str, ...]
    ) -> np.ndarray:
        """Figures of examples whose values are numbers, (B, names), float64."""
        parts = [found for _, found in settings.estimates(self.model, x)]
        columns = [torch.cat([getattr(part, name) for part in parts]).double() for name in names]
        return torch.stack(columns, 1).numpy()

    def _faults(self, x: Tensor) -> list[str | None]:
        """Why an example can't be scored by its values alone, or None, for each."""
        values = x.flatten(1).double().numpy()
        bad = ~(np.abs(values) <= LARGEST)
        faults: list[str | None] = [None] * len(values)
        for row in np.flatnonzero(bad.any(1)):
            place = int(bad[row].argmax())
            name = self.columns[place] if self.columns else f"x[{place}]"
            value = values[row, place]
            words = "is missing" if np.isnan(value) else f"is {value:g}, beyond {LARGEST:g}"
            faults[row] = f"{name} {words}"
        return faults

    def _moments(self, x: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of q(z|x), (B, L) each."""
        with torch.inference_mode():
            q = self.model.posterior(x)
            try:
                return q.mean, q.variance.sqrt()
            except (NotImplementedError, AttributeError):
                like = next(self.model.parameters())
                eps = standard_normal(
                    (MOMENT_SAMPLES, len(x), self.model.noise_dim),
                    like=like,
                    generator=torch.Generator().manual_seed(seed),
                )
                z = q.from_noise(eps)
                return z.mean(0), z.std(0)

    def _decode(self, values: np.ndarray) -> np.ndarray:
        size = self.model.noise_dim
        if values.ndim == 1:
            values = values[None]
        if values.ndim != 2 or values.shape[1] != size or len(values) == 0:
            raise refusal(f"decode takes z of shape (B, {size}); found {values.shape}")
        return self._mean_of(torch.from_numpy(values).to(self.model.dtype))

    def _mean_of(self, z: Tensor) -> np.ndarray:
        _check_size(len(z) * math.prod(self.model.config.data_shape), "asked for")
        with torch.inference_mode():
            return _all_finite(self.model.likelihood(z).mean.numpy(), "the answer")

    def _sample(self, count: int, seed: int) -> np.ndarray:
        _check_size(count * math.prod(self.model.config.data_shape), "asked for")
        generator = torch.Generator().manual_seed(seed)
        source = {"device": torch.device("cpu"), "generator": generator}
        with _sampling, torch.inference_mode():
            z = seeded_sample(self.model.prior(), (count,), **source)
            return _all_finite(
                seeded_sample(self.model.likelihood(z), (), **source).numpy(), "the answer"
            )

    def _in_order(self, values: Any) -> Any:
        """A DataFrame's columns by their names, where the model knows names; all else as it is."""
        if self.columns is None or not isinstance(values, pd.DataFrame):
            return values
        names = [str(name) for name in values.columns]
        if not set(names) & set(self.columns) and len(names) == len(self.columns):
            return values  # unnamed: 0, 1, …
        missing = [name for name in self.columns if name not in names]
        if missing:
            raise refusal(
                f"the columns {', '.join(missing)} are missing; expected "
                f"{', '.join(self.columns)}; found {', '.join(names)}"
            )
        if len(set(names)) < len(names):
            raise refusal(f"expected each column once; found {', '.join(names)}")
        return values.set_axis(names, axis=1)[self.columns].fillna(self.filled)

    def _to_data(self, values: np.ndarray) -> Tensor:
        """Values as the model's data, (B, *data_shape); raises unless they are of its space."""
        config = self.model.config
        shape, found = tuple(config.data_shape), values.shape
        flat = (math.prod(shape),)
        accepted = {shape, flat, tuple(size for size in shape if size > 1) or (1,)}
        if found in accepted and found[1:] not in accepted:
            values = values[None]
        elif found[1:] not in accepted:
            raise refusal(f"expected x of shape {_batch_of(shape)}; found {found}")
        if len(values) == 0:
            raise refusal(f"expected x of shape {_batch_of(shape)} with B at least 1; found none")
        top = {"binary": 1, "grey8": 255}.get(config.space)
        if top is not None:
            low, high = _all_finite(values).min(), values.max()
            if low < 0 or high > top or (values != np.round(values)).any():
                words = "0 or 1" if top == 1 else "whole grey levels 0…255, not rescaled"
                raise refusal(f"expected {words}; found values from {low:g} to {high:g}")
            if top == 255 and high == 1:
                raise refusal(
                    "expected whole grey levels 0…255, not rescaled; found only 0 and 1: black and "
                    "white are 0 and 255"
                )
        return torch.from_numpy(values.reshape(-1, *shape)).to(self.model.data_loc.dtype)


def checked_parameters(params: Mapping[str, Any] | None) -> dict[str, Any]:
    """All parameters with their defaults (num_samples None: the task's own)."""
    given = {key: value for key, value in (params or {}).items() if value is not None}
    unknown = sorted(set(map(str, given)) - set(PARAMETERS))
    if unknown:
        raise refusal(
            f"unknown parameter{'s' if len(unknown) > 1 else ''} {', '.join(unknown)}; "
            f"known: {', '.join(PARAMETERS)}"
        )
    task = given.get("task", "score")
    if task not in TASKS:
        raise refusal(f"unknown task {task!r}; known: {', '.join(TASKS)}")
    for name, low, high in (("num_samples", 1, MOST_SAMPLES), ("seed", 0, 2**63 - 1)):
        value = given.get(name, low)
        whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if not whole or not low <= value <= high:
            raise refusal(f"{name} is {value!r}; expected a whole number from {low} to {high}")
    return {"task": task, "num_samples": given.get("num_samples"), "seed": given.get("seed")}


def to_array(values: Any) -> np.ndarray:
    """Input as float64; raises for what is no number, ragged or too much.

    A missing value (None, null) is NaN.
    """
    try:
        given = np.asarray(values)
        if given.dtype == object:  # a frame of mixed numeric types, or None, text, ragged rows
            texts = any(isinstance(value, str | bytes) for value in given.reshape(-1))
            given = given.astype(np.str_ if texts else np.float64)
        if given.dtype.kind not in "biuf":
            raise TypeError
        if given.dtype.kind == "b":
            raise refusal("expected numbers; found true and false")
        _check_size(given.size, "found")
        array = np.array(given, dtype=np.float64)  # a copy: torch wants one it may write to
    except (TypeError, ValueError):
        raise refusal("expected numbers in rows of equal length; found something else") from None
    return array


def _all_finite(values: np.ndarray, what: str = "found") -> np.ndarray:
    """The values; raises where JSON has no word for one."""
    bad = ~np.isfinite(values)
    if bad.any():
        row = int(bad.reshape(len(values), -1).any(1).argmax()) if values.ndim > 1 else 0
        words = "expected finite numbers" if what == "found" else f"{what} is not finite"
        raise refusal(
            f"{words}; {bad.sum()} of {bad.size} are NaN or infinite, the first in example {row}"
        )
    return values


def _check_size(values: int, found: str) -> None:
    if values > MOST_VALUES:
        raise refusal(f"expected at most {MOST_VALUES:,} values in one call; {found} {values:,}")


def refusal(sentence: str) -> MlflowException:
    """What the served model answers with 400."""
    return MlflowException(sentence, error_code=INVALID_PARAMETER_VALUE)


def check_parameters_ourselves() -> None:
    """Let this model, and no other, see its input and parameters as they were sent.

    MLflow drops unknown parameters before the model sees them, so that a misspelt `num_sample`
    would be answered as if it had not been there, and allows one shape and dtype only.
    """
    original = getattr(mlflow.pyfunc, "_validate_prediction_input", None)
    if original is None or getattr(original, "passes_on", None) == PARAMETERS:
        return

    def validate(data: Any, params: Any, input_schema: Any, params_schema: Any, *rest: Any) -> Any:
        names = () if params_schema is None else tuple(spec.name for spec in params_schema.params)
        if names == PARAMETERS:
            if params is not None and not isinstance(params, dict):
                raise refusal(f"params must be an object; found {type(params).__name__}")
            return data, params
        return original(data, params, input_schema, params_schema, *rest)

    validate.passes_on = PARAMETERS  # type: ignore[attr-defined]
    mlflow.pyfunc._validate_prediction_input = validate


def bound_requests() -> None:
    """Have MLflow's server, where this process is one, refuse bodies that it could not hold.

    MLflow reads and parses a body of any length before the model sees it.
    """
    server = sys.modules.get("mlflow.pyfunc.scoring_server")
    original = getattr(server, "_async_catch_mlflow_exception", None)
    if original is None and server is not None and _is_serving():
        raise MlflowException(
            "this model refuses to be served: MLflow no longer has what bounds a request "
            "(_async_catch_mlflow_exception), and a body of any length would be read; serve it "
            "with the mlflow that requirements.txt names"
        )
    if original is None or hasattr(original, "most_bytes"):
        return

    def bounded(answer: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(answer)
        async def wrapper(request: Any) -> Any:
            size, parts = 0, []
            async for part in request.stream():  # all of it: a client reads once it has sent
                size += len(part)
                if size <= MOST_BYTES:
                    parts.append(part)
            if size > MOST_BYTES:
                raise refusal(f"expected a body of at most {MOST_BYTES:,} bytes; found {size:,}")
            request._body = b"".join(parts)
            if "content-type" not in request.headers:
                raise refusal("expected the header Content-Type: application/json")
            try:
                return await answer(request)
            except RecursionError:
                raise refusal("expected rows of numbers; found lists in lists …") from None

        return original(wrapper)

    bounded.most_bytes = MOST_BYTES  # type: ignore[attr-defined]
    server._async_catch_mlflow_exception = bounded  # type: ignore[union-attr]


def _json_safe(table: pd.DataFrame) -> pd.DataFrame:
    """Behind a server NaN (khat of few samples) becomes null, since NaN is not JSON."""
    if not _is_serving():
        return table
    return table.astype(object).where(table.notna(), None)


def _is_serving() -> bool:
    return os.environ.get("_MLFLOW_IS_IN_SERVING_ENVIRONMENT") == "true"


def _batch_of(shape: tuple[int, ...]) -> str:
    return f"(B, {', '.join(map(str, shape))})"


if __name__ != "pipeline.register.served_model":  # run as a model's code, rather than imported
    set_model(ScoredVAE())
