"""Each family's weights: our outputs are the reference library's, and what we write is what we read."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from clipjax.interop import export_weights, import_weights
from clipjax.params import abstract, merge
from flax import nnx

TO = {
    "hf_clip_quick": "hf",
    "hf_clip_exact": "hf",
    "hf_siglip": "hf",
    "hf_siglip2": "hf-siglip2",
}


@pytest.fixture(scope="module", params=TO)
def imported(request, golden, tmp_path_factory):
    case = golden(request.param)
    path = case.write(tmp_path_factory.mktemp("source") / request.param)
    return request.param, case, import_weights(path)


def outputs(pretrained, images, texts):
    graphdef, _, _ = abstract(lambda: pretrained.model.build(nnx.Rngs(0)))

    @jax.jit
    def run(params, state, image, text):
        return merge(graphdef, params, state)({"image": image, "text": text})

    encoded = run(pretrained.params, pretrained.model_state, images, texts)
    logits = encoded.logit_scale * encoded.image @ encoded.text.T
    logits += 0 if encoded.logit_bias is None else encoded.logit_bias
    return {"image": encoded.image, "text": encoded.text, "logits": logits}


def test_outputs_are_the_reference_librarys(imported):
    _, case, pretrained = imported
    ours = outputs(pretrained, case.images, case.texts)
    for name, theirs in case.outputs.items():
        np.testing.assert_allclose(ours[name], theirs, rtol=0, atol=1e-4, err_msg=name)


def test_export_of_import_is_the_same_to_the_bit(imported, tmp_path):
    name, case, pretrained = imported
    family = export_weights(pretrained, tmp_path / "out", TO[name])
    written = load_file(tmp_path / "out" / family.weights_file)
    assert written.keys() == case.tensors.keys()
    for tensor, array in case.tensors.items():
        assert written[tensor].dtype == array.dtype and written[tensor].shape == array.shape, tensor
        np.testing.assert_array_equal(written[tensor], array, err_msg=tensor)
    again = import_weights(tmp_path / "out")
    assert again.model == pretrained.model
    assert again.resize == pretrained.resize
