"""What all fits have in common: their states, and how they are judged."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any


def refuse_other_settings(state: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raise ValueError if a state was made with other settings than these dataclasses."""

    def plain(value: Any) -> Any:
        return [plain(v) for v in value] if isinstance(value, (tuple, list)) else value

    for part, values in settings.items():
        saved = state.get(part, {})
        if differing := [k for k, v in asdict(values).items() if plain(saved.get(k)) != plain(v)]:
            raise ValueError(f"This training state was made with other settings: {', '.join(differing)} differ.")


def verdict(summary: Mapping[str, Any]) -> str:
    """What a fit gained on noise that it never saw, in plain words; empty where that was not measured."""
    if "error" not in summary:
        return ""
    error, base = summary["error"], summary["base_solver_error"]
    if error >= base:
        return (
            f"It is NOT better than its base solver at equal model calls: error {error:.4g} against {base:.4g}. "
            "Try another sampler, more trajectories or another number of calls."
        )
    return f"error {error:.4g}, {1 - error / base:.0%} less than its base solver's at equal model calls"


def outcome(summary: Mapping[str, Any]) -> str:
    """The same in a few words, for where there is little room."""
    if "error" not in summary:
        return ""
    error, base = summary["error"], summary["base_solver_error"]
    return (
        "NOT better than its base solver"
        if error >= base
        else f"{1 - error / base:.0%} less error than its base solver"
    )
