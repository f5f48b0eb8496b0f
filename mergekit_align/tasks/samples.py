"""lm-eval tasks whose documents are our samples."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm_eval.api.task import ConfigurableTask

from mergekit_align.errors import InputError
from mergekit_align.samples import SAMPLE_TYPES, Sample, load_samples


class _Documents(list[dict[str, Any]]):
    """What lm-eval needs of a `datasets.Dataset`, without the half second that importing that takes."""

    @property
    def features(self) -> dict[str, Any]:
        """By name, as those of a dataset are."""
        return self[0]


class SampleTask(ConfigurableTask):  # type: ignore[misc]
    """Samples of one type (`sample_type`), and of one `category` where the YAML names one.

    `data` is a path relative to the YAML. It may also come from the run (`lm_eval --metadata
    '{"data": ...}'`): then it is relative to the working directory. Whatever else lm-eval's task YAML
    takes (`description`, `doc_to_text`, ...) works as usual; with `dataset_path` the documents are
    that dataset's, by lm-eval's own rules, in place of samples.

    Raises:
        InputError: the YAML or the data cannot be used.
    """

    OWN_KEYS: tuple[str, ...] = ("class", "sample_type", "category", "data")
    """Keys of the YAML that are not lm-eval's."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        metadata = dict(config.get("metadata") or {})
        self.where = str(metadata.get("config_source", "inline"))
        self.sample_type = config.get("sample_type")
        if self.sample_type not in SAMPLE_TYPES:
            raise InputError.at(
                self.where,
                "sample_type",
                found=self.sample_type,
                expected=f"one of {', '.join(SAMPLE_TYPES)}",
            )
        self.every_sample: list[Sample] = []
        if config.get("dataset_path") is None:
            self._load(config, metadata)
        own = {key: value for key, value in config.items() if key not in self.OWN_KEYS}
        super().__init__(config={**self._defaults(config), **own, "metadata": metadata})

    @abstractmethod
    def _defaults(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """lm-eval's keys, where the YAML does not say; the samples are there already."""

    def _load(self, config: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
        self.every_sample = load_samples(_data_path(config.get("data"), metadata, self.where))
        category = config.get("category")
        self.samples = [
            sample
            for sample in self.every_sample
            if sample.type == self.sample_type and category in (None, sample.category)
        ]
        if not self.samples:
            kind = self.sample_type if category is None else f"{self.sample_type} of {category!r}"
            raise InputError.at(
                self.where,
                "data",
                found=f"no {kind} sample",
                expected=f"some, for task {config.get('task')}",
            )

    def download(self, *args: Any, **kwargs: Any) -> None:
        if not self.every_sample:
            super().download(*args, **kwargs)
            return
        documents: Any = _Documents(each.model_dump(exclude={"type"}) for each in self.samples)
        if self.config.process_docs is not None:  # which may use all that a dataset has
            import datasets

            documents = datasets.Dataset.from_list(documents)
        self.dataset = {"test": documents}


def _data_path(data: Any, metadata: Mapping[str, Any], where: str) -> Path:
    from_run = metadata.get("data")
    if data is None and from_run is None:
        raise InputError.at(
            where, "data", found="nothing", expected="a path, here or in the run's metadata"
        )
    if data is None:
        return Path(str(from_run)).expanduser()
    directory = Path.cwd() if where == "inline" else Path(where).parent
    return directory / Path(str(data)).expanduser()
