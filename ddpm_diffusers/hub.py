"""What a trained pipeline's repository on the Hub gets: the model card with its training and figures, and the push.

A push sends a list of files, never a folder as it lies, in one commit; it is tried again where that can help, and ends
in one sentence where it cannot.
"""

import json
import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from diffusers.utils import logging
from huggingface_hub import CommitOperationAdd, EvalResult, HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import httpx, validate_repo_id

from . import pipeline_pixel_diffusion
from .data import SYNTHETIC
from .pipeline_pixel_diffusion import (
    COMPONENT_FILES,
    README,
    SAMPLES,
    PixelDiffusionPipeline,
    check_token,
    create_repo,
    with_repo_id,
)

logger = logging.get_logger(__name__)

WAITS = (1, 4, 16)  # seconds before the second, third and fourth try of a push
TASK = {"task_type": "unconditional-image-generation", "task_name": "unconditional image generation"}

# what the Hub's client raises: refusals, broken connections, the same out of its upload threads, metadata refused
CLIENT_ERRORS = (httpx.HTTPError, OSError, RuntimeError, ValueError)


class PushError(RuntimeError):
    """A push that failed: what the Hub answered, and that the folder is kept."""


def model_card(
    pipe: PixelDiffusionPipeline,
    repo_id: str,
    *,
    dataset_name: str | None = None,
    settings: dict | None = None,
    figures: Iterable[dict] = (),
    has_samples: bool = False,
) -> ModelCard:
    """The pipeline's card for `repo_id`, with what only the training knows; `.save(path)` writes it.

    Args:
        pipe: The pipeline to describe.
        repo_id: "owner/name", which the card's snippets load.
        dataset_name: As given to the training. It is named only where it is the id of a data set on the Hub, or the
            built-in one.
        settings: Of the training, shown as a table; None, and what may be a path or a token, is left out.
        figures: As in `add_figures`.
        has_samples: The repository has a grid of samples, `samples.png`.

    Raises:
        ValueError: On figures that `add_figures` refuses.
    """
    card = pipeline_pixel_diffusion.model_card(pipe, repo_id, has_samples)
    if dataset_name == SYNTHETIC:
        training = f"Trained on {SYNTHETIC}, garments that ddpm-diffusers draws itself."
    elif dataset_name is not None and is_hub_id(dataset_name):
        card.data.datasets = [dataset_name]
        training = f"Trained on [{dataset_name}](https://huggingface.co/datasets/{dataset_name})."
    else:
        training = "Trained on images that are not on the Hub."
    rows = [(name, value) for name, value in (settings or {}).items() if is_publishable(name, value)]
    if rows:
        training += "\n\n" + table(("setting", "value"), rows)
    card.text = with_section(card.text, "Training", training)
    return ModelCard(add_figures(str(card), figures))


def add_figures(card: str, figures: Iterable[dict]) -> str:
    """Put measured figures into a card in place of earlier ones: `model-index` in its metadata, a table in its body.

    Args:
        card: The text of a card.
        figures: One dict a figure, of the arguments of `huggingface_hub.EvalResult`: at least `dataset_type` (the data
            set's id), `dataset_name` (its name to show), `metric_type` and `metric_value`; `metric_name`,
            `dataset_split` and `metric_args` (how it was measured) are shown too. No figures remove the earlier ones.

    Returns:
        The text of the card.

    Raises:
        ValueError: On a figure that lacks one of these or has unknown ones, names a local path, or is not finite.
    """
    results = [eval_result(figure) for figure in figures]
    card = ModelCard(card)
    title = re.search(r"^# (.+)$", card.text, re.MULTILINE)
    card.data.eval_results = results or None
    card.data.model_name = (title[1] if title else PixelDiffusionPipeline.__name__) if results else None
    rows = [
        (
            result.metric_name or result.metric_type,
            result.metric_value,
            " ".join(filter(None, (result.dataset_name, result.dataset_split))),
            ", ".join(f"{name} {value}" for name, value in (result.metric_args or {}).items()),
        )
        for result in results
    ]
    shown = table(("metric", "value", "data set", "measured with"), rows) if rows else None
    card.text = with_section(card.text, "Measured figures", shown)
    return str(card)


def prepare_repo(repo_id: str, token: str | None = None, private: bool | None = None) -> str:
    """Create the repository, unless it exists, and try the right to write: before a training, not after it.

    Args:
        repo_id: "owner/name", or a name in the token's own namespace.
        token: Of the Hub; that of `HF_TOKEN` or `hf auth login` by default.
        private: Of a new repository; True is also asked of one that exists.

    Returns:
        The full id. Where the Hub cannot be reached, or has trouble of its own, a warning and `repo_id` as it is.

    Raises:
        PermissionError: Without a token, or with one that is refused or must not write there.
        ValueError: On what cannot be a token or an id, and on a public repository where `private` is True.
    """
    validate_repo_id(repo_id)
    check_token(token)
    if token is None and get_token() is None:
        raise PermissionError(
            f"There is no token of the Hub to push to {repo_id} with: run `hf auth login`, or set HF_TOKEN."
        )
    api = HfApi(token=token)
    try:
        repo_id = create_repo(repo_id, private, token).repo_id
        api.auth_check(repo_id, write=True)
    except CLIENT_ERRORS as error:
        status, answer = describe(error, token)
        if status in (401, 402, 403, 404):
            raise PermissionError(
                f"The token must not write to {repo_id} ({answer}): name a repository of your own or of your"
                " organization, and use a token with write access to it."
            ) from None
        if not is_transient(error) and not isinstance(error, OfflineModeIsEnabled):
            raise ValueError(f"{repo_id} cannot be pushed to: {answer}.") from None
        logger.warning(f"{repo_id} could not be prepared ({answer}): the push will be tried after the training.")
    return repo_id


def push_folder(
    folder: str | Path,
    repo_id: str,
    token: str | None = None,
    private: bool | None = None,
    commit_message: str = "Upload pipeline",
    waits: Sequence[float] = WAITS,
) -> str:
    """Upload a saved pipeline in one commit (in none where nothing has changed), and nothing that lies beside it.

    Its files are the card, the grid of samples, `model_index.json`, the pipeline's code, and the components' configs,
    weights (safetensors) and code. The card's snippets then load `repo_id`.

    Args:
        folder: As `save_pretrained` leaves it. It is only read.
        repo_id: "owner/name", or a name in the token's own namespace; created where it does not exist.
        token: Of the Hub; that of `HF_TOKEN` or `hf auth login` by default.
        private: Of a new repository; True is also asked of one that exists.
        commit_message: Of the commit.
        waits: Seconds before each further try after a broken connection, a time-out or trouble of the Hub's own.

    Returns:
        The repository's URL.

    Raises:
        ValueError: Before any work, on what cannot be a token or an id, and on a folder that is no whole pipeline.
        PushError: Where the push failed.
    """
    files = pipeline_files(folder)
    validate_repo_id(repo_id)
    check_token(token)
    api = HfApi(token=token)

    def push() -> str:
        repo = create_repo(repo_id, private, token)
        card = Path(folder, README)
        contents = {name: str(Path(folder, name)) for name in files}
        if card.is_file():
            contents[README] = with_repo_id(card.read_text("utf-8"), repo.repo_id).encode()
        operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
        api.create_commit(repo.repo_id, operations, commit_message=commit_message)
        return str(repo)

    for wait in (*waits, None):
        try:
            return push()
        except CLIENT_ERRORS as error:
            answer = describe(error, token)[1]
            if wait is None or not is_transient(error):
                break
        logger.warning(f"The push to {repo_id} did not go through ({answer}); trying again in {wait} s.")
        time.sleep(wait)
    raise PushError(f"The push to {repo_id} failed: {answer}. {folder} is kept")


def pipeline_files(folder: str | Path) -> list[str]:
    """What of a folder is the pipeline, as paths in it, or a ValueError where a part is missing."""
    folder = Path(folder)
    try:
        index = json.loads((folder / "model_index.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} is no folder of a saved pipeline, with a readable model_index.json ({error}): give the folder"
            " that `save_pretrained` or the training wrote."
        ) from error
    root = [README, SAMPLES, "model_index.json"]
    if isinstance(index.get("_class_name"), list):
        root.append(f"{index['_class_name'][0]}.py")
    files = [name for name in root if (folder / name).is_file()]
    for name, value in index.items():
        if not name.isidentifier() or name.startswith("_") or not isinstance(value, list) or value[0] is None:
            continue
        found = {path.name for pattern in COMPONENT_FILES for path in (folder / name).glob(pattern)}
        if not found or ("config.json" in found and not any(file.endswith(".safetensors") for file in found)):
            raise ValueError(f"{folder} lacks {'the weights' if found else 'all files'} of `{name}`: save it again.")
        files += [f"{name}/{file}" for file in sorted(found)]
    return files


def describe(error: Exception, token: str | None) -> tuple[int | None, str]:
    """The status of the Hub's answer, if there was one, and a text for people; never with the token."""
    error = cause(error)
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status is not None:
        text = f"the Hub answered {status} {error.server_message or error.response.reason_phrase}"
    elif isinstance(error, OfflineModeIsEnabled):
        text = "HF_HUB_OFFLINE is set"
    elif isinstance(error, httpx.HTTPError):
        text = f"the Hub cannot be reached: {type(error).__name__} {error}"
    else:
        text = str(error)
    secret = token or get_token()
    return status, " ".join((text.replace(secret, "<token>") if secret else text).split()).rstrip(".")


def is_transient(error: Exception) -> bool:
    """Whether the same call may succeed a little later."""
    error = cause(error)
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (408, 409, 412, 429) or error.response.status_code >= 500
    # a page of a proxy where JSON should be; what Xet's client raises is a RuntimeError, or one of a connection
    transient = (httpx.HTTPError, ConnectionError, TimeoutError, RuntimeError, json.JSONDecodeError)
    return isinstance(error, transient) and not isinstance(error, OfflineModeIsEnabled)


def cause(error: Exception) -> Exception:
    """What lies behind the error of an upload thread."""
    in_thread = isinstance(error, RuntimeError) and isinstance(error.__cause__, httpx.HTTPError)
    return error.__cause__ if in_thread else error


def eval_result(figure: dict) -> EvalResult:
    try:
        # JSON knows Python's numbers alone, as does the YAML of a card, and none that are not finite
        result = EvalResult(**{**TASK, **json.loads(json.dumps(figure, allow_nan=False))})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{figure!r} is no figure ({error}): it needs finite arguments of EvalResult.") from error
    if not is_hub_id(result.dataset_type):
        raise ValueError(f"`dataset_type` is {result.dataset_type!r}; it must be an id of the Hub, not a local path.")
    return result


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form of an id and is not a path here."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def is_publishable(name: str, value) -> bool:
    """Whether a setting can be shown to all: not a token, nor anything that may be a path here."""
    if "token" in name or name.endswith("_dir"):
        return False
    if isinstance(value, (list, tuple)):
        return all(is_publishable(name, part) for part in value)
    if isinstance(value, str):
        return not (re.search(r"^hf_|[/\\~]", value) or Path(value).exists())
    return isinstance(value, (bool, int, float))


def table(header: tuple, rows: Iterable[tuple]) -> str:
    rows = [[" ".join(str(cell).split()).replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def with_section(text: str, heading: str, body: str | None) -> str:
    """The text of a card with this section in place of an earlier one of that heading; without it if None."""
    text = re.sub(rf"^## {heading}\n.*?(?=^## |\Z)", "", text, flags=re.MULTILINE | re.DOTALL)
    if body is None:
        return text
    before, limits, after = text.partition("## Limits\n")
    return f"{before.rstrip()}\n\n## {heading}\n\n{body}\n" + (f"\n{limits}{after}" if limits else "")
