import warnings

import numpy as np
import pytest
import safetensors.torch
import torch
from goldens_io import SALT, fill, golden
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import FlavaImageCodebook, FlavaImageCodebookConfig

from simla.checkpoint.image_tokenizers import (
    build_image_tokenizer,
    fit_kmeans_codebook,
    load_codebook,
    load_dalle,
    load_flava,
    save_codebook,
)
from simla.models.dvae import DalleEncoder, KMeansCodebook
from simla.utils import UserError

SMALL = {"n_hid": 64, "vocab_size": 512}


@pytest.fixture
def dall_e():
    return pytest.importorskip("dall_e", reason="the dall-e package (and attrs, which it forgets to require)")


@pytest.fixture(scope="module")
def small():
    model = DalleEncoder(**SMALL)
    state = {name: fill(SALT, name, tuple(shape)) for name, shape in golden("dalle")["small"]["state_dict"]}
    model.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
    return model


@pytest.fixture(scope="module")
def code_view():
    rs = np.random.RandomState(golden("dalle")["small"]["input_seed"])
    cells, grain = rs.random_sample((2, 3, 4, 4)), rs.random_sample((2, 3, 32, 32))
    return torch.from_numpy((0.8 * cells.repeat(8, 2).repeat(8, 3) + 0.2 * grain).astype("float32"))


# ---- DALL-E ----


def test_the_full_size_encoder_has_the_published_names_and_shapes():
    with torch.device("meta"):
        model = DalleEncoder()
    state = [[name, list(value.shape), str(value.dtype)[6:]] for name, value in model.state_dict().items()]
    assert sorted(state) == sorted(golden("dalle")["full_size"]["state_dict"])
    assert (model.vocab_size, model.stride) == (8192, 8)
    assert not any(param.requires_grad for param in model.parameters())


def test_recorded_logits_and_codes(small, code_view):
    recorded = golden("dalle")["small"]
    assert code_view.double().sum().item() == pytest.approx(recorded["input_digest"]["sum"], rel=1e-7)
    logits = small.logits(code_view)
    assert list(logits.shape) == recorded["logits"]["shape"]
    assert logits.double().norm().item() == pytest.approx(recorded["logits"]["norm"], rel=1e-6)
    values = logits.flatten()[::997].tolist()[: len(recorded["logits_every_997th"])]
    assert values == pytest.approx(recorded["logits_every_997th"], abs=1e-6)
    assert small(code_view).view(2, 4, 4).tolist() == recorded["argmax"]
    centred = logits.double() - logits.double().mean((0, 2, 3), keepdim=True)
    assert centred.argmax(1).tolist() == recorded["centred_argmax"]


def test_equal_to_the_dall_e_package(dall_e, small, code_view):
    theirs = dall_e.Encoder(**SMALL)
    theirs.load_state_dict(small.state_dict())
    expected = theirs(dall_e.map_pixels(code_view))
    assert torch.allclose(small.logits(code_view), expected, atol=1e-6)


@settings(max_examples=5)
@given(st.integers(1, 3), st.integers(1, 3))
def test_one_code_per_patch_in_raster_order(batch, side):
    model = DalleEncoder(n_hid=8, vocab_size=32, n_blk_per_group=1)
    views = torch.rand(batch, 3, 8 * side, 8 * side)
    codes = model(views)
    assert codes.shape == (batch, side * side) and codes.dtype == torch.int64
    assert torch.equal(codes, model.logits(views).argmax(1).reshape(batch, -1))


def test_the_training_precision_does_not_change_the_codes(small, code_view):
    expected = small.logits(code_view)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(small.logits(code_view), expected)


@pytest.mark.parametrize("is_zip", [True, False])
def test_openai_file_is_read_without_running_it(dall_e, tmp_path, code_view, is_zip, monkeypatch):
    torch.manual_seed(3)
    theirs = dall_e.Encoder(**SMALL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(theirs, tmp_path / "encoder.pkl", _use_new_zipfile_serialization=is_zip)
    expected = theirs(dall_e.map_pixels(code_view)).argmax(1).flatten(1)
    monkeypatch.setattr(dall_e.Encoder, "__setstate__", lambda *_: pytest.fail("the package was used"))
    assert torch.equal(load_dalle(tmp_path / "encoder.pkl")(code_view), expected)


def test_state_dicts_and_safetensors_load_too(tmp_path, small, code_view):
    torch.save({"model": small.state_dict()}, tmp_path / "a.pth")
    safetensors.torch.save_file(small.state_dict(), tmp_path / "b.safetensors")
    for name in ("a.pth", "b.safetensors"):
        loaded = build_image_tokenizer({"kind": "dalle", "path": tmp_path / name, "vocab_size": 512})
        assert torch.equal(loaded(code_view), small(code_view))


def test_flava_has_the_same_network(tmp_path, small, code_view):
    config = FlavaImageCodebookConfig(hidden_size=64, vocab_size=512)
    torch.manual_seed(1)
    theirs = FlavaImageCodebook(config)
    theirs.save_pretrained(tmp_path / "flava")
    expected = theirs.get_codebook_indices(0.8 * code_view + 0.1).flatten(1)
    assert torch.equal(load_flava(tmp_path / "flava")(code_view), expected)
    prefixed = {f"image_codebook.{name}": value for name, value in theirs.state_dict().items()}
    torch.save(prefixed, tmp_path / "full.pth")
    assert torch.equal(load_dalle(tmp_path / "full.pth")(code_view), expected)


def test_clear_errors_for_missing_and_foreign_files(tmp_path, small):
    with pytest.raises(UserError, match=r"there is no .*cdn\.openai\.com.*kind: kmeans"):
        build_image_tokenizer({"kind": "dalle", "path": tmp_path / "encoder.pkl", "vocab_size": 8192})
    with pytest.raises(UserError, match=r"facebook/flava-image-codebook from .*kind: kmeans"):
        load_flava(tmp_path)
    state = small.state_dict()
    state.pop("blocks.group_2.block_1.id_path.w")
    for content in (state, {"a": 1}, [1]):
        torch.save(content, tmp_path / "x.pth")
        with pytest.raises(UserError, match="does not hold DALL-E's image encoder"):
            load_dalle(tmp_path / "x.pth")
    torch.save(small.state_dict(), tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"vocab_size is 8192, .*x\.pth has 512"):
        build_image_tokenizer({"kind": "dalle", "path": tmp_path / "x.pth", "vocab_size": 8192})


# ---- k-means ----


def pictures(num, seed=0, res=32):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(num, 3, res // 8, res // 8, generator=generator)
    fine = torch.rand(num, 3, res, res, generator=generator)
    return 0.9 * torch.nn.functional.interpolate(coarse, size=(res, res)) + 0.1 * fine


@settings(max_examples=10)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 20))
def test_codes_are_the_nearest_centres(batch, side, num_codes):
    codebook = KMeansCodebook(num_codes)
    codebook.centres.copy_(torch.rand(num_codes, 192))
    views = torch.rand(batch, 3, 8 * side, 8 * side)
    codes = codebook(views)
    assert codes.shape == (batch, side * side) and codes.dtype == torch.int64
    for b in range(batch):
        for row in range(side):
            for column in range(side):
                patch = views[b, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8].reshape(-1)
                distances = (codebook.centres - patch).square().sum(1)
                assert distances[codes[b, row * side + column]] <= distances.min() + 1e-4


def test_fitting_finds_separate_clusters_whatever_the_start():
    colours = torch.eye(3).repeat(2, 1) * torch.tensor([1.0, 1, 1, 0.4, 0.4, 0.4])[:, None]  # six colours
    views = colours[torch.arange(24) % 6].view(24, 3, 1, 1).expand(-1, -1, 16, 16)
    for seed in range(5):
        codebook = KMeansCodebook(6).fit([views], iterations=12, seed=seed)
        assert len(set(codebook(views).flatten().tolist())) == 6
        assert torch.allclose(
            codebook.centres[codebook(views)[0, 0]].view(3, 64), colours[0][:, None], atol=1e-6
        )


def test_fitting_is_deterministic_and_lowers_the_distortion():
    views = pictures(40)

    def distortion(codebook):
        patches = torch.nn.functional.unfold(views, 8, stride=8).transpose(1, 2)
        return (patches - codebook.centres[codebook(views)]).square().mean().item()

    fitted = [KMeansCodebook(16).fit(list(views), iterations=8, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(fitted[0].centres, fitted[1].centres) and not torch.equal(
        fitted[0].centres, fitted[2].centres
    )
    start = KMeansCodebook(16).fit(list(views), iterations=0, seed=0)
    assert distortion(fitted[0]) < 0.8 * distortion(start)
    assert len(fitted[0](views).unique()) == 16


def test_fitting_reads_no_more_views_than_it_needs():
    read = []

    def views():
        for view in pictures(50):
            read.append(1)
            yield view

    KMeansCodebook(4).fit(views(), num_patches=40, iterations=1)  # 16 patches each
    assert len(read) == 5
    with pytest.raises(UserError, match="16 patches cannot give 17 k-means codes"):
        KMeansCodebook(17).fit(pictures(1))


def test_codebooks_are_saved_and_built_by_config(tmp_path):
    path = tmp_path / "codes.safetensors"
    config = {"kind": "kmeans", "path": str(path), "vocab_size": 8}
    with pytest.raises(UserError, match=r"no k-means codebook .* pre-training fits it"):
        build_image_tokenizer(config)
    fitted = fit_kmeans_codebook(path, pictures(20), vocab_size=8, iterations=2)
    loaded = build_image_tokenizer(config)
    assert torch.equal(loaded.centres, fitted.centres) and (loaded.vocab_size, loaded.stride) == (8, 8)
    assert torch.equal(loaded(pictures(2, seed=5)), fitted(pictures(2, seed=5)))
    with pytest.raises(UserError, match="vocab_size is 9"):
        build_image_tokenizer(config | {"vocab_size": 9})
    with pytest.raises(UserError, match=r"name the k-means codebook \.safetensors"):
        save_codebook(fitted, tmp_path / "codes.bin")
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="not a k-means codebook"):
        load_codebook(tmp_path / "other.safetensors")
