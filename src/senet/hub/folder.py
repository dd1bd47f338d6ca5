"""The folder of a shared network, using the mixin of ``huggingface_hub``. Imported only to save or load a network."""

import contextlib
import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, PyTorchModelHubMixin, constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from torch import nn

from senet._version import __version__
from senet.errors import InputError
from senet.hub.timm_registry import PREFIX, input_cfg, layer_names
from senet.models.registry import NetworkConfig, model_spec
from senet.weights.create import create_described
from senet.weights.load import described_network, load_weights, save_weights

TEMPLATE = resources.files("senet.hub").joinpath("model_card.md")
CLASSES_SHOWN = 20


class NetworkFolder(
    PyTorchModelHubMixin,
    library_name="senet",
    tags=["squeeze-and-excitation"],
    paper_url="https://arxiv.org/abs/1709.01507",
):
    """A network with its configuration and metadata; the mixin saves, loads, and uploads it.

    Attributes:
        network: the network.
        config: its configuration.
        metadata: the metadata of its weight file, including ``config``.
    """

    def __init__(self, network: nn.Module, network_config: NetworkConfig, metadata: dict[str, Any]) -> None:
        self.network, self.config, self.metadata = network, network_config, metadata
        self.feed = input_cfg(
            network_config.in_chans, model_spec(network_config.model).input_size, metadata.get("transform")
        )
        self._hub_mixin_config = self._config_json()

    def _save_pretrained(self, save_directory: Path) -> None:
        save_weights(save_directory / constants.SAFETENSORS_SINGLE_FILE, self.network, self.metadata)

    @classmethod
    def _from_pretrained(
        cls, *, model_id: str, config: dict[str, Any] | None = None, **options: Any
    ) -> "NetworkFolder":
        """Load a folder or repository. ``options`` that are not download options change the network."""
        known = ("revision", "cache_dir", "force_download", "local_files_only", "token")
        download = {key: options.pop(key) for key in known}
        name = constants.SAFETENSORS_SINGLE_FILE
        path = Path(model_id) / name if Path(model_id).is_dir() else hf_hub_download(model_id, name, **download)
        described = config.get("senet", {}) if isinstance(config, dict) else {}
        network_config, _ = described_network(described, model_id)
        described_network(described, path, load_weights(path)[0])
        network_config = network_config.changed(**options)
        return cls(create_described(network_config, str(path)).eval(), network_config, {})

    @property
    def by_name(self) -> bool:
        """Whether name and arguments alone recreate the network; timm does not know attached or folded gates."""
        return self.config.attached is None and self.config.folded is None

    def _config_json(self) -> dict[str, Any]:
        """``config.json``: our entries under ``senet``, and those that ``timm.create_model("hf-hub:…")`` reads."""
        config = self.config
        values = {"senet": config.to_dict() | {"version": __version__}, "num_classes": config.num_classes}
        if not self.by_name:
            return values
        for_timm = {
            "architecture": PREFIX + config.model,
            "num_features": getattr(self.network, "num_features", None),
            "model_args": {"se": config.to_dict()["se"], "in_chans": config.in_chans, **config.kwargs},
            "pretrained_cfg": self.feed | layer_names(self.network) | {"num_classes": config.num_classes},
        }
        classes = self.metadata.get("classes")
        return values | for_timm | ({"label_names": classes} if classes else {})

    def generate_model_card(self, source: str) -> ModelCard:
        """The model card: facts about the network, how to load it from ``source``, and the citation."""
        metadata = self.metadata
        numbers = {key: n for key, n in (metadata.get("metrics") or {}).items() if isinstance(n, int | float)}
        values: dict[str, Any] = {
            "config": self.config,
            "by_name": self.by_name,
            "parameters": sum(parameter.numel() for parameter in self.network.parameters()),
            "feed": self.feed,
            "resize": round(self.feed["input_size"][-1] / self.feed["crop_pct"]),
            "metrics": numbers,
            "classes": metadata.get("classes") or [],
            "shown": CLASSES_SHOWN,
            "dataset": metadata.get("dataset"),
            "license": metadata.get("license"),
            "paper_url": self._hub_mixin_info.paper_url,
        }
        template = TEMPLATE.read_text(encoding="utf-8")
        return ModelCard.from_template(self._card_data(numbers), template_str=template, source=source, **values)

    def _card_data(self, metrics: dict[str, float]) -> ModelCardData:
        """The metadata block of the card. The Hub accepts metrics only with a dataset."""
        config, dataset, info = self.config, self.metadata.get("dataset"), self._hub_mixin_info.model_card_data
        classifies = config.num_classes > 0 and not config.kwargs.get("features_only")
        task = "image-classification" if classifies else "image-feature-extraction"
        results = (
            [EvalResult(task, dataset, dataset, name, value) for name, value in metrics.items()] if dataset else None
        )
        return ModelCardData(
            license=self.metadata.get("license"),
            library_name=info.library_name,
            pipeline_tag=task,
            tags=[*(info.tags or []), task],
            datasets=dataset,
            model_name=config.model,
            eval_results=results,
        )


@contextlib.contextmanager
def one_line(what: str) -> Iterator[None]:
    """Turn exceptions of ``huggingface_hub`` into an ``InputError`` that starts with ``what``."""
    try:
        yield
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, HFValidationError, EntryNotFoundError) as error:
        raise InputError(f"{what}: {' '.join(str(error).split())}") from error
