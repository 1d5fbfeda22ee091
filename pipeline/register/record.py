"""What a registered version says of itself: measured once, whole, and told in one place.

Tags, the version's page, register.json and the report are all made from one record. Evidence that
is weaker than what a version has on record never takes its place, not even in part.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

RECORD_TAG = "record"
EVIDENCE_KEYS = (
    "log_px",
    "log_px_se",
    "log_px_mc_se",
    "bits_per_dim",
    "num_samples",
    "num_examples",
    "num_unscored",
    "khat_bad_fraction",
    "proposal",
    "target_se",
    "precision",
    "seed",
    "data_hash",
)
"""Of the test split, from one run of evaluate."""

VERDICT_KEYS = ("verdict", "reasons", "gain", "gain_se", "num_pairs", "num_left_out",
                "compared_with", "gate")  # fmt: skip


def stored_record(tags: Mapping[str, str]) -> dict[str, Any] | None:
    """The record that a version carries, or None where it has none of ours."""
    try:
        found = json.loads(tags[RECORD_TAG])
    except (KeyError, ValueError):
        return None
    return found if isinstance(found, dict) and set(EVIDENCE_KEYS) <= set(found) else None


def is_weaker(new: Mapping[str, Any], old: Mapping[str, Any]) -> bool:
    """Whether evidence says less than what is on record, of the same data.

    By the number of samples where both were made in one way, else by the Monte-Carlo error of the
    mean. Evidence of other data is no weaker: it answers another question.
    """
    if new["data_hash"] != old["data_hash"]:
        return False
    way = ("proposal", "target_se", "precision")
    if all(new[key] == old[key] for key in way):
        return new["num_samples"] < old["num_samples"]
    errors = new["log_px_mc_se"], old["log_px_mc_se"]
    if None in errors:
        return errors[0] is None and errors[1] is not None
    return errors[0] > errors[1]


def record_tags(
    result: Mapping[str, Any], model: Mapping[str, Any], measure: str
) -> dict[str, str]:
    """All tags that a version has by its record; a key that is not among them is to be removed.

    result: what register.json holds.
    """
    checks = result["selfcheck"]
    facts = {
        "weights_hash": result["weights_hash"],
        "measure": measure,
        "likelihood": model["likelihood"],
        "latent_dim": model["latent_dim"],
        "git_commit": result["git_commit"],
        "data_hash": result["data_hash"],
        "verdict": result["verdict"],
        "reasons": "; ".join(result["reasons"]),
        "looks": result["looks"],
        "gate": "passed" if result["gate"]["passed"] else "shut",
        "selfcheck": f"{checks['passed_checks']} of {checks['num_checks']} passed",
    }
    facts |= {key: result[key] for key in ("log_px", "log_px_se", "bits_per_dim", "num_samples",
                                           "khat_bad_fraction", "proposal")}  # fmt: skip
    tags = {key: str(value) for key, value in facts.items() if value is not None}
    kept = {key: result[key] for key in (*EVIDENCE_KEYS, *VERDICT_KEYS)}
    return tags | {RECORD_TAG: json.dumps(kept)}


TAGS = frozenset(
    ("weights_hash", "measure", "likelihood", "latent_dim", "git_commit", "data_hash", "verdict",
     "reasons", "looks", "gate", "selfcheck", "log_px", "log_px_se", "bits_per_dim", "num_samples",
     "khat_bad_fraction", "proposal", "dvc_lock", RECORD_TAG)
)  # fmt: skip
"""The tags that are ours to set and to remove; a person's own stay."""
