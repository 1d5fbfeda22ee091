"""The registered model: what MLflow loads and serves, from code and safetensors, no pickle.

This file and the package `vae` travel with the weights; nothing else of the project is needed.
One task for each call, by the parameter `task`:

    score        x -> DataFrame: log_px, se, ess, khat, bits_per_dim, percentile
    encode       x -> {"mean": (B, L), "std": (B, L)} of q(z|x)
    decode       z -> (B, *data_shape), the mean of p(x|z)
    reconstruct  x -> (B, *data_shape), the mean of p(x|z) at the mean of q(z|x)
    sample       -> (num_samples, *data_shape), x ~ p(x|z), z ~ p(z)

An example's score depends on the example, K and the seed alone, not on its neighbours in a batch:
its noise is seeded by its content. Shapes: B examples, L latent values, K importance samples, D
data values. Nats, but for bits_per_dim.
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
from collections.abc import Callable, Mapping
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

from vae.checkpoint import load
from vae.evidence import importance_sampling
from vae.model import VAE
from vae.noise import example_generators, seeded_sample, standard_normal

TASKS = ("score", "encode", "decode", "reconstruct", "sample")
PARAMETERS = ("task", "num_samples", "seed")
MOST_SAMPLES = 100_000
MOST_DRAWS = 2**21  # B x K of one call: about a minute of a small model on two cores
MOST_VALUES = 2**24  # of the input and of the answer
MOST_BYTES = 2**25  # of a served request's body, before it is parsed
DEFAULT_IMAGES = 16
BATCH_VALUES = 2**17  # data values scored at a time
MOMENT_SAMPLES = 1000  # for the moments of a posterior that has none in closed form

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
        self.num_samples = int(reference["num_samples"])
        self.proposal = str(reference.get("proposal", "encoder"))
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
        quantiles), how many for `sample` (16); seed (0).
        Raises MlflowException, in a sentence, for anything else.
        """
        chosen = checked_parameters(params)
        task, seed = chosen["task"], chosen["seed"]
        if task == "sample":
            return self._sample(chosen["num_samples"] or DEFAULT_IMAGES, seed)
        if task == "decode":
            return self._decode(to_array(model_input))
        x = self._to_data(to_array(self._in_order(model_input)))
        if task == "score":
            return self._score(x, chosen["num_samples"] or self.num_samples, seed)
        mean, std = self._moments(x, seed)
        if task == "encode":
            return {"mean": mean.numpy(), "std": std.numpy()}
        return self._mean_of(mean)

    def _score(self, x: Tensor, num_samples: int, seed: int) -> pd.DataFrame:
        if len(x) * num_samples > MOST_DRAWS:
            raise refusal(
                f"{len(x):,} examples with {num_samples:,} samples each are more than a call takes "
                f"({MOST_DRAWS:,} in all); send fewer examples at a time, or lower num_samples"
            )
        rows = max(1, BATCH_VALUES // x[0].numel())
        parts = [
            importance_sampling(
                self.model,
                part,
                num_samples,
                generator=example_generators(part, seed),
                proposal=self.proposal,
            )
            for part in x.split(rows)
        ]
        names = ("log_px", "se", "ess", "khat")
        table = pd.DataFrame(
            {n: torch.cat([getattr(p, n) for p in parts]).double().numpy() for n in names}
        )
        if self.model.config.space != "continuous":
            table["bits_per_dim"] = -table["log_px"] / (x[0].numel() * math.log(2))
        table["percentile"] = np.interp(
            table["log_px"], self.reference_log_px, self.reference_percent
        )
        return _json_safe(table)

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
            return self.model.likelihood(z).mean.numpy()

    def _sample(self, count: int, seed: int) -> np.ndarray:
        _check_size(count * math.prod(self.model.config.data_shape), "asked for")
        generator = torch.Generator().manual_seed(seed)
        source = {"device": torch.device("cpu"), "generator": generator}
        with _sampling, torch.inference_mode():
            z = seeded_sample(self.model.prior(), (count,), **source)
            return seeded_sample(self.model.likelihood(z), (), **source).numpy()

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
            low, high = values.min(), values.max()
            if low < 0 or high > top or (values != np.round(values)).any():
                words = "0 or 1" if top == 1 else "whole grey levels 0…255, not rescaled"
                raise refusal(f"expected {words}; found values from {low:g} to {high:g}")
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
    return {"task": task, "num_samples": given.get("num_samples"), "seed": given.get("seed", 0)}


def to_array(values: Any) -> np.ndarray:
    """Input as float64; raises for what is no number, not finite, ragged or too much."""
    try:
        given = np.asarray(values)
        if given.dtype == object:  # a frame of mixed numeric types, or None, text, ragged rows
            texts = any(isinstance(value, str | bytes) for value in given.reshape(-1))
            given = given.astype(np.str_ if texts else np.float64)
        if given.dtype.kind not in "biuf":
            raise TypeError
        _check_size(given.size, "found")
        array = np.array(given, dtype=np.float64)  # a copy: torch wants one it may write to
    except (TypeError, ValueError):
        raise refusal("expected numbers in rows of equal length; found something else") from None
    bad = ~np.isfinite(array)
    if bad.any():
        raise refusal(f"expected finite numbers; {bad.sum()} of {bad.size} are NaN or infinite")
    return array


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
    if os.environ.get("_MLFLOW_IS_IN_SERVING_ENVIRONMENT") != "true":
        return table
    return table.astype(object).where(table.notna(), None)


def _batch_of(shape: tuple[int, ...]) -> str:
    return f"(B, {', '.join(map(str, shape))})"


if __name__ != "pipeline.serving":  # run as a model's code, rather than imported
    set_model(ScoredVAE())
