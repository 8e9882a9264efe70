"""Parse README.md front matter and validate it like the Hub's validate-yaml endpoint, as far as its rules are known."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import yaml

from gradmap_hub.files import parse_json

from .errors import InvalidName
from .names import RepoType, parse_repo_id

# Two searches, since one pattern from the first line to the last takes quadratic time on many line breaks.
_OPENING = re.compile(r"\s*---[\r\n]")
_CLOSING = re.compile(r"[\r\n]---(?:[\r\n]|\Z)")
#: Limit in characters, which take about a second to parse; cards of this project have fewer than 10,000.
_FRONT_MATTER_LIMIT = 256 * 1024

_LICENSE_IDS = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc
cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0
cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0
cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1
eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c
ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa
unlicense zlib pddl lgpl-lr deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1
llama3.2 llama3.3 llama4 grok2-community gemma unknown other
"""
LICENSES = frozenset(_LICENSE_IDS.split())
_NODE_LIMIT = 100_000
RELATIONS = ("adapter", "merge", "quantized", "finetune")
SPACE_SDKS = ("gradio", "docker", "static", "streamlit")
#: The headers that a card may set for a static Space.
CUSTOM_HEADERS = ("cross-origin-embedder-policy", "cross-origin-opener-policy", "cross-origin-resource-policy")
SPACE_COLORS = ("red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray")


@dataclass(frozen=True)
class Findings:
    """Problems in a model card. Errors block a commit, warnings do not."""

    errors: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


class _Loader(yaml.SafeLoader):
    """YAML as the Hub reads it: YAML 1.2 booleans (``no`` is a string) and no duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else id(key_node)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"duplicated mapping key {key!r}", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def _load(text: str) -> object:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _expanded_size(node, {}) > _NODE_LIMIT:
            raise ValueError("Invalid YAML: the metadata is too large")
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _expanded_size(node: yaml.Node, known: dict[int, int]) -> int:
    """The number of values in a document with all aliases expanded: a few lines can expand to billions."""
    if id(node) not in known:
        # A node that is reached again before its size is known contains itself.
        known[id(node)] = _NODE_LIMIT + 1
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        flat = [part for child in children for part in (child if isinstance(child, tuple) else (child,))]
        known[id(node)] = 1 + sum(_expanded_size(child, known) for child in flat)
    return known[id(node)]


def parse_front_matter(readme: str) -> dict[str, Any] | None:
    """The front matter as JSON-compatible values; None if there is no front matter.

    Raises:
        ValueError: the front matter is too long, not valid YAML, not a mapping, or not representable as JSON.
    """
    opening = _OPENING.match(readme)
    closing = _CLOSING.search(readme, opening.end()) if opening else None
    if opening is None or closing is None:
        return None
    if closing.start() - opening.end() > _FRONT_MATTER_LIMIT:
        raise ValueError(f"The metadata has more than {_FRONT_MATTER_LIMIT} characters")
    text, problem = _read_once(readme[opening.end() : closing.start()])
    if problem is not None:
        raise ValueError(problem)
    return None if text is None else json.loads(text)


@lru_cache(maxsize=256)  # lists of repositories read every card each time, and a bad one may take a second
def _read_once(text: str) -> tuple[str | None, str | None]:
    """What :func:`_metadata_json` returns, or the message of its error."""
    try:
        return _metadata_json(text), None
    except ValueError as error:
        return None, str(error)


def _metadata_json(text: str) -> str | None:
    """The metadata as JSON, which turns dates and keys into strings; None if there is none.

    Raises:
        ValueError: see :func:`parse_front_matter`.
    """
    try:
        data = _load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"Invalid YAML: {error}") from error
    except RecursionError as error:
        raise ValueError("Invalid YAML: nested too deeply") from error
    except Exception as error:  # PyYAML lets through what Python raises on a value that does not fit its tag
        raise ValueError(f"Invalid YAML: {type(error).__name__}: {error}") from error
    if data is None:
        return None
    if not isinstance(data, dict):
        raise ValueError("The metadata must be a mapping of keys to values")
    try:
        written = json.dumps(data, default=str, allow_nan=False)
        parse_json(written.encode(), finite=True)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"The metadata cannot be written as JSON: {error}") from error
    return written


def validate_card(readme: str, repo_type: RepoType) -> Findings:
    """Validate a README.md before it is committed."""
    try:
        data = parse_front_matter(readme)
    except ValueError as error:
        return Findings(errors=(str(error),))
    if data is None:
        if repo_type == "space":
            return Findings(errors=("Missing configuration in README",))
        return Findings(warnings=("empty or missing yaml metadata in repo card",))
    checks: dict[RepoType, Callable[[Mapping[str, Any]], Findings]] = {
        "model": _check_model,
        "dataset": _check_dataset,
        "space": _check_space,
    }
    return checks[repo_type](data)


_LANGUAGE = re.compile(r"[a-z]{2,3}|code|multilingual")


def _texts(value: object) -> list[str] | None:
    """A string or a list of strings as a list; None for anything else."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return value
    return None


def _check_common(data: Mapping[str, Any], errors: list[str], warnings: list[str]) -> None:
    for name in ("language", "license", "base_model", "datasets"):
        if data.get(name) is not None and _texts(data[name]) is None:
            errors.append(f'"{name}" must be a string or a list of strings')
    for language in _texts(data.get("language")) or []:
        if not _LANGUAGE.fullmatch(language):
            errors.append(
                f'"language" with value {language!r} is not valid. It must be an ISO 639-1, 639-2 or 639-3 code '
                '(two/three letters), or a special value like "code", "multilingual".'
            )
    tags = data.get("tags")
    if tags is not None and not (isinstance(tags, list) and all(isinstance(tag, str) and tag for tag in tags)):
        errors.append('"tags" must be an array of strings')
    licenses = _texts(data.get("license")) or []
    for license_id in licenses:
        if license_id not in LICENSES:
            errors.append(f'"license" must be one of [{", ".join(sorted(LICENSES))}], got {license_id!r}')
    if "other" in licenses and not data.get("license_name"):
        warnings.append('"license_name" should be given with "license: other"')
    for name in ("license_name", "license_link", "pretty_name"):
        if data.get(name) is not None and not isinstance(data[name], str):
            errors.append(f'"{name}" must be a string')
    for name in ("base_model", "datasets"):
        for repo_id in _texts(data.get(name)) or []:
            try:
                # Some old Hub repositories have no owner.
                parse_repo_id(repo_id if "/" in repo_id else f"owner/{repo_id}")
            except InvalidName:
                errors.append(f'"{name}" with value {repo_id!r} is not valid. Use a model id from the Hub')


def _check_model(data: Mapping[str, Any]) -> Findings:
    errors: list[str] = []
    warnings: list[str] = []
    _check_common(data, errors, warnings)
    for name in ("pipeline_tag", "library_name"):
        if data.get(name) is not None and not isinstance(data[name], str):
            errors.append(f'"{name}" must be a string')
    relation = data.get("base_model_relation")
    if relation is not None and relation not in RELATIONS:
        errors.append(f'"base_model_relation" must be one of [{", ".join(RELATIONS)}]')
    if data.get("model-index") is not None:
        _check_model_index(data["model-index"], errors)
    return Findings(tuple(errors), tuple(warnings))


def _check_model_index(index: object, errors: list[str]) -> None:
    if not isinstance(index, list):
        errors.append('"model-index" must be an array')
        return
    for number, model in enumerate(index):
        at = f"model-index[{number}]"
        if not isinstance(model, dict):
            errors.append(f'"{at}" must be of type object')
            continue
        if not isinstance(model.get("name"), str):
            errors.append(f'"{at}.name" is required')
        results = model.get("results")
        if not isinstance(results, list):
            errors.append(f'"{at}.results" is required')
            continue
        for row, result in enumerate(results):
            _check_result(f"{at}.results[{row}]", result, errors)


def _check_result(at: str, result: object, errors: list[str]) -> None:
    if not isinstance(result, dict):
        errors.append(f'"{at}" must be of type object')
        return
    for part, names in (("task", ("type",)), ("dataset", ("name", "type"))):
        value = result.get(part)
        if not isinstance(value, dict):
            errors.append(f'"{at}.{part}" is required')
            continue
        errors.extend(f'"{at}.{part}.{name}" is required' for name in names if not isinstance(value.get(name), str))
    metrics = result.get("metrics")
    if not isinstance(metrics, list) or not metrics:
        errors.append(f'"{at}.metrics" is required')
        return
    for number, metric in enumerate(metrics):
        if not isinstance(metric, dict) or not isinstance(metric.get("type"), str):
            errors.append(f'"{at}.metrics[{number}].type" is required')
        elif metric.get("value") is None:
            errors.append(f'"{at}.metrics[{number}].value" is required')


def _check_dataset(data: Mapping[str, Any]) -> Findings:
    errors: list[str] = []
    warnings: list[str] = []
    _check_common(data, errors, warnings)
    for name in ("task_categories", "task_ids", "size_categories"):
        if data.get(name) is not None and _texts(data[name]) is None:
            errors.append(f'"{name}" must be a string or a list of strings')
    return Findings(tuple(errors), tuple(warnings))


def _check_space(data: Mapping[str, Any]) -> Findings:
    errors: list[str] = []
    warnings: list[str] = []
    _check_common(data, errors, warnings)
    if data.get("sdk") not in SPACE_SDKS:
        errors.append(f'"sdk" must be one of [{", ".join(SPACE_SDKS)}]')
    for name in ("colorFrom", "colorTo"):
        if data.get(name) is not None and data[name] not in SPACE_COLORS:
            errors.append(f'"{name}" must be one of [{", ".join(SPACE_COLORS)}]')
    for name in ("title", "app_file", "sdk_version", "python_version", "short_description"):
        # YAML reads an unquoted 5.10 as the number 5.1.
        if data.get(name) is not None and not isinstance(data[name], str):
            errors.append(f'"{name}" must be a string')
    if isinstance(data.get("short_description"), str) and len(data["short_description"]) > 60:
        errors.append('"short_description" length must be less than or equal to 60 characters long')
    headers = data.get("custom_headers")
    if headers is not None and not (isinstance(headers, dict) and set(headers) <= set(CUSTOM_HEADERS)):
        errors.append(f'"custom_headers" may have only {", ".join(CUSTOM_HEADERS)}')
    if data.get("pinned") is not None and not isinstance(data["pinned"], bool):
        errors.append('"pinned" must be a boolean')
    return Findings(tuple(errors), tuple(warnings))
