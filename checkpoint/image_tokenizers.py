"""Image tokenizers from their files: DALL-E's encoder, FLAVA's, a k-means codebook."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from simla.checkpoint.load import weights_in
from simla.checkpoint.safe_load import Inert, safe_load
from simla.models.dvae import DalleEncoder, KMeansCodebook
from simla.utils import UserError, atomic_write, check_weight, hub_answer

DALLE_URL = "https://cdn.openai.com/dall-e/encoder.pkl"
FLAVA_NAME = "facebook/flava-image-codebook"
OTHERWISE = "or train without a download: image_tokenizer.kind: kmeans"


def _dalle_from_state(state: dict[str, Tensor], source: str) -> DalleEncoder:
    """Return the encoder, of the size that the weights have. Raises UserError for any other weights."""
    # FLAVA's names: image_codebook.blocks.group_1.group.block_1.res_path.path.conv_1.weight
    flava = {"image_codebook.": "", ".group.": ".", ".path.": ".", ".weight": ".w", ".bias": ".b"}
    for old, new in flava.items():
        state = {name.replace(old, new): value for name, value in state.items()}
    state = {name: value for name, value in state.items() if name.startswith("blocks.")}
    try:
        model = DalleEncoder(
            n_hid=state["blocks.input.w"].shape[0],
            vocab_size=state["blocks.output.conv.w"].shape[0],
            n_blk_per_group=len({name.split(".")[2] for name in state if name.startswith("blocks.group_1.")}),
            groups=len({name.split(".")[1] for name in state if name.startswith("blocks.group_")}),
        )
        for name, value in state.items():
            check_weight(value, name, source)
        model.load_state_dict(state)
    except (KeyError, RuntimeError) as error:
        raise _no_encoder(source, error) from error
    return model.to(memory_format=torch.channels_last)  # as half-precision convolutions want it


def _no_encoder(source: str, cause: Exception) -> UserError:
    return UserError(
        f"{source} does not hold DALL-E's image encoder ({str(cause)[:200]}); get {DALLE_URL}, {OTHERWISE}"
    )


def _module_state(module: Inert, prefix: str = "") -> dict[str, Tensor]:
    """Return the state dict of a whole pickled module."""
    state = {prefix + name: value for name, value in module.state.get("_parameters", {}).items()}
    for name, child in module.state.get("_modules", {}).items():
        state |= _module_state(child, f"{prefix}{name}.")
    return state


def load_dalle(path: str | Path) -> DalleEncoder:
    """Return the encoder of OpenAI's encoder.pkl (a whole module; nothing of it is run), a state dict or
    .safetensors. Raises UserError when the file is missing or holds something else.
    """
    if not Path(path).is_file():
        raise UserError(f"image_tokenizer.path: there is no {path}; put {DALLE_URL} there, {OTHERWISE}")
    content = safe_load(path)
    try:
        state = _module_state(content) if isinstance(content, Inert) else weights_in(content, str(path))
    except UserError as error:
        raise _no_encoder(str(path), error) from error
    return _dalle_from_state(state, str(path))


def load_flava(name_or_folder: str | Path) -> DalleEncoder:
    """Return the encoder of transformers' FlavaImageCodebook, on the hub or in a folder. Raises UserError
    without one.
    """
    from transformers import FlavaImageCodebook  # slow to import, and only this tokenizer needs it

    where = "" if Path(name_or_folder).exists() else f" nor is it {hub_answer()}"
    try:
        codebook, report = FlavaImageCodebook.from_pretrained(name_or_folder, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"image_tokenizer.path: {name_or_folder} is no folder with FLAVA's image codebook{where}; get "
            f"{FLAVA_NAME} from the Hugging Face hub, {OTHERWISE}"
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"{name_or_folder} does not hold FLAVA's image codebook: {missing[0]} is missing")
    return _dalle_from_state(codebook.state_dict(), str(name_or_folder))


def save_codebook(codebook: KMeansCodebook, path: str | Path) -> None:
    """Write the codebook. Raises UserError when the file cannot be written or is not named .safetensors."""
    if Path(path).suffix != ".safetensors":
        raise UserError(f"image_tokenizer.path: name the k-means codebook .safetensors, not {path}")
    with atomic_write(path) as file:
        file.write(safetensors.torch.save({"centres": codebook.centres.cpu().contiguous()}))


def load_codebook(path: str | Path) -> KMeansCodebook:
    """Return the codebook of a file that `save_codebook` wrote. Raises UserError for any other."""
    content = safe_load(path)
    centres = content["model"].get("centres") if Path(path).suffix == ".safetensors" else None
    if centres is None or centres.ndim != 2:
        raise UserError(f"{path} is not a k-means codebook; fit it again under another name")
    check_weight(centres, "centres", str(path))
    codebook = KMeansCodebook(len(centres), patch=round((centres.shape[1] / 3) ** 0.5))
    codebook.centres.copy_(centres)
    return codebook


def fit_kmeans_codebook(
    path: str | Path, code_views: Iterable[Tensor], vocab_size: int, **fit_options: int
) -> KMeansCodebook:
    """Return a codebook fitted on the views and saved as `path`; options: those of `KMeansCodebook.fit`."""
    codebook = KMeansCodebook(vocab_size).fit(code_views, **fit_options)
    save_codebook(codebook, path)
    return codebook


def fingerprint(tokenizer: nn.Module) -> str:
    """Return a checksum of the weights: equal codes mean the same only where it is equal."""
    digest = hashlib.sha256()
    for name, value in sorted(tokenizer.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def untrained_image_tokenizer(config: dict) -> DalleEncoder | KMeansCodebook:
    """Return one of the config section's kind and vocabulary, at full size, with random weights or none."""
    kind = KMeansCodebook if config["kind"] == "kmeans" else DalleEncoder
    return kind(vocab_size=config["vocab_size"])


def build_image_tokenizer(config: dict) -> DalleEncoder | KMeansCodebook:
    """Return the tokenizer of the config section {kind: dalle, flava or kmeans, path, vocab_size}.

    Raises UserError when a file is missing or its vocabulary is not `vocab_size`.
    """
    kind, path = config["kind"], config["path"]
    if kind == "kmeans":
        if not Path(path).is_file():
            raise UserError(f"image_tokenizer.path: no k-means codebook {path}; pre-training fits it")
        tokenizer = load_codebook(path)
    else:
        tokenizer = load_dalle(path or "encoder.pkl") if kind == "dalle" else load_flava(path or FLAVA_NAME)
    if config["vocab_size"] != tokenizer.vocab_size:
        has = f"{path or kind} has {tokenizer.vocab_size} codes"
        raise UserError(f"image_tokenizer.vocab_size is {config['vocab_size']}, but {has}")
    return tokenizer
