"""Each family's weights: our outputs are the reference library's, and what we write is what we read."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from clipjax import ClipjaxError
from clipjax.interop import export_weights, import_weights
from clipjax.interop.convert import FAMILIES
from clipjax.interop.family import Description
from clipjax.models.coca import CoCa
from clipjax.params import abstract, merge, paths

TO = {
    "hf_clip_quick": "hf",
    "hf_clip_exact": "hf",
    "hf_siglip": "hf",
    "hf_siglip2": "hf-siglip2",
    "hf_metaclip2": "hf-metaclip2",
    "openai_vit": "openai",
    "openai_resnet": "openai",
    "open_clip_vit": "open_clip",
    "open_clip_quick_eos": "open_clip",
    "open_clip_custom": "open_clip-custom",
    "open_clip_siglip": None,  # OpenCLIP knows timm's models by their full size only
    "open_clip_siglip2": None,
    "open_clip_pe": None,
    "open_clip_eva02": None,
    "open_clip_eva": None,
    "open_clip_eva02_e": None,
    "open_clip_mobile2_l": None,
    "open_clip_coca": "open_clip",
    "open_clip_coca_packed": "open_clip",
    "big_vision_siglip": "big_vision",
    "big_vision_scanned": "big_vision-scanned",
    "big_vision_lit": "big_vision",
}


@pytest.fixture(scope="module", params=TO)
def imported(request, golden, tmp_path_factory):
    case = golden(request.param)
    path = case.write(tmp_path_factory.mktemp("source") / request.param)
    return request.param, case, import_weights(path)


def outputs(pretrained, images, texts):
    graphdef, _, _ = abstract(lambda: pretrained.model.build(nnx.Rngs(0)))

    captions = isinstance(pretrained.model, CoCa)
    batch = {"image": images, "text": texts}
    batch = {name: rows for name, rows in batch.items() if rows is not None}
    needs = frozenset(batch) | ({"captions"} if captions else set())

    # Compiled once and run once: the least optimization takes the least time.
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def run(params, state, batch):
        return merge(graphdef, params, state)(batch, needs=needs)

    encoded = run(pretrained.params, pretrained.model_state, batch)
    if len(batch) == 1:
        return {name: encoded[name] for name in batch}
    found = {}
    if captions:
        words = np.asarray(encoded["captions"] @ encoded.shared["caption_head"])
        found["captions"] = np.concatenate([row[: 9 - i, :8] for i, row in enumerate(words)])
    logits = encoded.logit_scale * encoded["image"] @ encoded["text"].T
    logits += 0 if encoded.logit_bias is None else encoded.logit_bias
    return {"image": encoded["image"], "text": encoded["text"], "logits": logits} | found


def test_outputs_are_the_reference_librarys(imported):
    _, case, pretrained = imported
    ours = outputs(pretrained, case.images, case.texts)
    for name, theirs in case.outputs.items():
        np.testing.assert_allclose(ours[name], theirs, rtol=0, atol=1e-4, err_msg=name)


def test_the_table_writes_what_it_read_to_the_bit(imported):
    _, case, pretrained = imported
    flat = dict(paths(pretrained.params)) | dict(paths(pretrained.model_state))
    family = claimed(case)
    assert_same_tensors(family.table(pretrained.model).write(flat), case.tensors)


def test_an_exported_folder_is_the_imported_one(imported, tmp_path):
    name, case, pretrained = imported
    if TO[name] is None:
        own = name == "open_clip_mobile2_l"  # a ViT as OpenCLIP's own, but for its projection
        reason = "image_projection='affine'" if own else "none has width 48, depth 2, heads"
        with pytest.raises(ClipjaxError, match=reason):
            export_weights(pretrained, tmp_path / "out", "open_clip")
        assert not (tmp_path / "out").exists()
        return
    family = export_weights(pretrained, tmp_path / "out", TO[name])
    written = tmp_path / "out" / family.weights_file
    assert_same_tensors(
        np.load(written) if case.family == "big_vision" else load_file(written), case.tensors
    )
    again = import_weights(tmp_path / "out")
    assert again.model == pretrained.model
    assert again.resize == pretrained.resize


def claimed(case):
    description = Description({n: t.shape for n, t in case.tensors.items()}, case.files)
    return next(family for family in FAMILIES if family.claims(description))


def assert_same_tensors(written, original):
    assert set(written) == set(original)
    for tensor, array in original.items():
        assert (written[tensor].dtype, written[tensor].shape) == (array.dtype, array.shape), tensor
        np.testing.assert_array_equal(written[tensor], array, err_msg=tensor)
