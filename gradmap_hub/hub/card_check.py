"""Checks the YAML header of a README.md locally: with the parser of huggingface_hub, the rules of the embedded Hub
(those that are known of the real Hub), and our own."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from gradmap_hub.errors import CardInvalid
from gradmap_hub.layout import CARD

_OTHER_HINT = "Give its name and URL with --license-name and --license-link."


@dataclass(frozen=True)
class CardFacts:
    """Facts from a valid header. `results`: number of evaluation results in its model index."""

    license: str | None
    base_model: str | None
    results: int


def is_known_license(license_id: str) -> bool:
    """Whether the id is in our list; the list of the Hub may be longer."""
    from gradmap_hub.local_hub.cards import LICENSES

    return license_id in LICENSES


def check_card(text: str, kind: str, *, shown_as: str = CARD, accepted: Collection[str] = ()) -> CardFacts:
    """Check a README.md.

    Args:
        text: The whole file.
        kind: "model" or "space".
        shown_as: Its name in error messages.
        accepted: Licence ids outside our list that the Hub accepts.

    Raises:
        CardInvalid: the header is missing or invalid; `problems` lists all problems.
    """
    from gradmap_hub.local_hub.cards import parse_front_matter, validate_card

    repo_type = "space" if kind == "space" else "model"
    try:
        data = parse_front_matter(text)
    except ValueError as error:
        raise CardInvalid(shown_as, (" ".join(str(error).split())[:200],)) from error
    if data is None:
        raise CardInvalid(shown_as, ("it is missing",))
    license_id = data.get("license")
    problems = [
        problem
        for problem in validate_card(text, repo_type).errors
        if not (problem.startswith('"license"') and license_id in accepted)
    ]
    problems += _client_problems(text, repo_type)
    if repo_type == "model":
        problems += _model_problems(data)
    if problems:
        missing_name = license_id == "other" and any("license_" in problem for problem in problems)
        raise CardInvalid(shown_as, tuple(problems), hint=_OTHER_HINT if missing_name else None)
    base = data.get("base_model")
    return CardFacts(license_id, base if isinstance(base, str) else None, _results(data))


def _client_problems(text: str, repo_type: str) -> list[str]:
    """Errors of huggingface_hub when it reads the card; ModelCardData also parses the results of the model index."""
    from huggingface_hub import ModelCard, SpaceCard

    try:
        (SpaceCard if repo_type == "space" else ModelCard)(text, ignore_metadata_errors=False)
    except (ValueError, TypeError, KeyError) as error:
        return [f"huggingface_hub cannot parse it: {' '.join(str(error).split())[:200]}"]
    return []


def _model_problems(data: Mapping[str, Any]) -> list[str]:
    problems: list[str] = []
    if not data.get("license"):
        problems.append('"license" is missing')
    elif data["license"] == "other":
        problems += [
            f'"license: other" needs "{name}"' for name in ("license_name", "license_link") if not data.get(name)
        ]
    if not data.get("pipeline_tag"):
        problems.append('"pipeline_tag" is missing')
    if data.get("base_model_relation") and not data.get("base_model"):
        problems.append('"base_model_relation" needs "base_model"')
    return problems


def _results(data: Mapping[str, Any]) -> int:
    index = data.get("model-index") or []
    return sum(len(model.get("results", [])) for model in index)
