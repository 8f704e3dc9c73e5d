"""Where images come from: data sets of the Hub, local ones, and folders of images, opened by `datasets`."""

import glob
import os
import re
from pathlib import Path

from datasets import Dataset, DatasetDict, Features, Image, IterableDataset, load_dataset, load_from_disk
from datasets.data_files import SPLIT_KEYWORDS
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from diffusers.utils import logging
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import httpx

from .synthetic_fashion import SYNTHETIC

logger = logging.get_logger(__name__)


def check_image_column(features: Features, image_column: str) -> None:
    if image_column not in features:
        raise ValueError(
            f"The data set has no column {image_column!r}; it has {', '.join(features)}: pass one of them as"
            " `image_column`."
        )
    if not isinstance(features[image_column], Image):
        raise ValueError(
            f"Column {image_column!r} holds {features[image_column]}, not images: pass the column of images as"
            " `image_column`."
        )


def open_dataset(
    dataset_name: str | None,
    dataset_config_name: str | None,
    train_data_dir: str | None,
    split: str,
    cache_dir: str | None,
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """`load_dataset` with errors that say what to do; `train_data_dir` and saved data sets are never streamed."""
    advice = "pass a data set of the Hub or a local folder as `dataset_name`, or a folder of images as"
    advice += f" `train_data_dir`, and one of its splits as `split`; or use `dataset_name` {SYNTHETIC}, built in"
    if train_data_dir == "":  # which would be the current directory
        raise ValueError("`train_data_dir` is empty (by an unset variable?): give a folder, or leave it out.")
    if train_data_dir is not None and dataset_config_name is not None:
        raise ValueError(
            f"`dataset_config_name` is {dataset_config_name!r}, but the folder of images {train_data_dir} has no"
            " configurations: leave one of them out."
        )
    name = train_data_dir or dataset_name
    dataset_name = dataset_name and os.path.expanduser(dataset_name)
    try:
        if train_data_dir is not None:
            files = files_by_split(train_data_dir)
            loaded = load_dataset("imagefolder", data_files=files, split=split, cache_dir=cache_dir)
            warn_if_images_are_not_taken_once(loaded, train_data_dir)
            return loaded
        if (Path(dataset_name) / "state.json").is_file() or (Path(dataset_name) / "dataset_dict.json").is_file():
            loaded = load_from_disk(dataset_name)
            splits = loaded if isinstance(loaded, DatasetDict) else {str(loaded.split or "train"): loaded}
            if split not in splits:
                raise ValueError(f"it has no split {split!r}, but {', '.join(splits)} alone")
            return splits[split]
        loaded = load_dataset(dataset_name, dataset_config_name, split=split, cache_dir=cache_dir, streaming=streaming)
        if not streaming and loaded.builder_name == "imagefolder" and Path(dataset_name).is_dir():
            warn_if_images_are_not_taken_once(loaded, dataset_name)
        return loaded
    except DatasetNotFoundError as error:
        raise ValueError(f"There is no data set {name!r} that can be read ({error}): {advice}.") from error
    except (httpx.HTTPError, ConnectionError) as error:
        raise ConnectionError(f"The Hub cannot be reached for data set {name!r} ({error}): {advice}.") from error
    except IndexError as error:  # what `datasets` raises for no rows on disk, and for an empty name
        raise ValueError(f"Data set {name!r} is empty: {advice}.") from error
    except (OSError, ValueError, RuntimeError, DatasetGenerationError) as error:  # RuntimeError: it has a script
        if absent := not_answered(error):
            raise ConnectionError(f"The Hub cannot be reached for data set {name!r} ({absent}): {advice}.") from error
        raise ValueError(f"Data set {name!r} cannot be read ({error}): {advice}.") from error


def not_answered(error: BaseException | None) -> LocalEntryNotFoundError | None:
    """The error of a Hub that failed to answer, where `datasets` took it for a missing file."""
    while error is not None and not isinstance(error, LocalEntryNotFoundError):
        error = error.__cause__ or error.__context__  # `datasets` raises others "from None"
    return error


def files_by_split(folder: str) -> dict[str, list[str]]:
    """Patterns of a folder's images: by split if all lie in subfolders or zips named after splits, else all "train".

    Left to itself, `datasets` would look for such names at any depth, and a class may have one.
    """
    root = Path(folder).expanduser().resolve()
    entries = sorted(path for path in root.iterdir() if is_seen(path))
    # subfolders with images, and zips
    sources = [e for e in entries if is_archive(e) or any(is_image(p) or is_archive(p) for p in e.rglob("*"))]
    patterns, named = {}, []
    for split, words in SPLIT_KEYWORDS.items():
        for source in sources:
            name = source.stem if is_archive(source) else source.name
            if re.fullmatch(rf"({'|'.join(words)})([-._ \d].*)?", name.lower()):
                pattern = glob.escape(str(source))
                patterns.setdefault(str(split), []).append(f"{pattern}/**" if source.is_dir() else pattern)
                named.append(source.name)
    mixed = len(named) < len(sources) or any(map(is_image, entries))
    if patterns and not mixed:
        return patterns
    if len(named) > 1 or set(patterns) - {"train"}:  # a class of one such name may be meant, "test" hardly
        logger.warning(f"{folder} has other images than in {', '.join(sorted(named))}: all are taken for one split.")
    return {"train": [f"{glob.escape(str(root))}/**"]}


def is_seen(path: Path) -> bool:
    """Whether `datasets` looks at a path of this name."""
    return not path.name.startswith((".", "__"))


def is_image(path: Path) -> bool:
    return path.suffix.lower() in ImageFolder.EXTENSIONS and is_seen(path)


def is_archive(path: Path) -> bool:
    return path.suffix.lower() == ".zip" and is_seen(path)


def warn_if_images_are_not_taken_once(loaded: Dataset, folder: str) -> None:
    """Warn if `datasets` leaves images of a folder out or takes some twice."""
    root = Path(folder).expanduser().resolve()
    paths = list(root.rglob("*"))
    if any(map(is_archive, paths)):
        return  # how many images these hold would take reading them
    # images that only a link to a folder outside reaches, which `rglob` does not follow
    links = [path for path in paths if path.is_symlink() and path.is_dir() and not path.resolve().is_relative_to(root)]
    paths += [path for link in links for path in link.rglob("*")]
    images = (path.relative_to(root) for path in paths if is_image(path))
    there = sum(all(map(is_seen, list(path.parents)[:-1])) for path in images)  # not those in hidden folders
    found = sum(split.num_examples for split in loaded.info.splits.values())
    if found != there:
        logger.warning(
            f"{folder} holds {there} images, and `datasets` takes {found}: it goes by split names in paths and by"
            " metadata files, and follows no links to folders. Rename, list or move images so that each is taken once."
        )
