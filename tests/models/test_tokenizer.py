import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from quick_compile import jit
from vgpt_jax import Tokenizer, UserError
from vgpt_jax.losses import l1
from vgpt_jax.models.vqgan import VQGANDecoder, VQGANEncoder

VQVAE = {
    "image_size": 16,
    "architecture": "vqvae",
    "architecture_args": {"z_channels": 6, "ch": 16, "num_res_blocks": 1, "res_channels": 8},
}
VQGAN = {
    "image_size": 8,
    "architecture": "vqgan",
    "architecture_args": {"z_channels": 6, "ch": 8, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (4,)},
}
QUANTIZER = {"num_codewords": 16, "embedding_dim": 4, "pretrain_steps": 0, "penalty_weight": 0.0}


def create(base=VQVAE, **options):
    return Tokenizer(**({"quantizer_args": QUANTIZER, "rngs": nnx.Rngs(0)} | base | options))


def make(base=VQVAE, **options):
    """A tokenizer with weights by NumPy (JAX would compile an initialiser for every shape), and spread codes."""
    graph, state = nnx.split(nnx.eval_shape(lambda: create(base, **options)))
    rng, filled = np.random.default_rng(0), []
    for path, variable in nnx.to_flat_state(state):
        spread = {"kernel": np.prod(variable.shape[:-1]) ** -0.5, "bias": 0.1, "codebook": 0.5}.get(path[-1], 0.0)
        value = (path[-1] == "scale") + spread * rng.normal(size=variable.shape)
        filled.append((path, variable.replace(jnp.asarray(value, variable.dtype))))
    return nnx.merge(graph, nnx.from_flat_state(filled))


def images_for(base, batch=2):
    shape = (batch, base["image_size"], base["image_size"], 3)
    return np.random.default_rng(1).uniform(size=shape).astype(np.float32)


def apply(function, tokenizer, *args):
    """``function(tokenizer, *args)``, compiled."""
    graph, state = nnx.split(tokenizer)
    return jit(lambda state, *args: function(nnx.merge(graph, state), *args))(state, *args)


def reconstruct(tokenizer, images):
    return apply(lambda tokenizer, images: tokenizer(images), tokenizer, images)


@pytest.mark.parametrize("factorized", [True, False])
def test_encode_then_decode_is_the_reconstruction(factorized):
    options = {} if factorized else {"code_factorization": False, "quantizer_args": QUANTIZER | {"embedding_dim": 6}}
    images = images_for(VQVAE)
    tokenizer = make(**options)
    output = reconstruct(tokenizer, images)
    token_ids = apply(lambda tokenizer: tokenizer.encode(images), tokenizer)
    decoded = apply(lambda tokenizer, token_ids: tokenizer.decode(token_ids), tokenizer, token_ids)
    np.testing.assert_array_equal(token_ids, output.quantized.token_ids)
    np.testing.assert_allclose(decoded, output.reconstruction, atol=1e-6)
    assert len(np.unique(token_ids)) > 2
    assert token_ids.min() >= 0
    assert token_ids.max() < 16
    assert token_ids.shape == (2, 4, 4)
    assert token_ids.dtype == jnp.int32
    assert output.reconstruction.shape == images.shape
    assert output.reconstruction.dtype == jnp.float32


def test_the_warm_start_decodes_the_latents_themselves():
    tokenizer = make(quantizer_args=QUANTIZER | {"pretrain_steps": 1})
    images = images_for(VQVAE)
    warm = reconstruct(tokenizer, images).reconstruction
    unquantized = apply(lambda tokenizer: tokenizer.decode_latents(tokenizer.latents(images)), tokenizer)
    np.testing.assert_allclose(warm, unquantized, atol=1e-6)
    quantized = apply(lambda tokenizer: tokenizer.decode(tokenizer.encode(images)), tokenizer)
    assert np.abs(quantized - warm).max() > 1e-3


@pytest.mark.parametrize(("base", "grid"), [(VQVAE, (4, 4)), (VQGAN, (4, 4)), (VQVAE | {"image_size": 32}, (8, 8))])
def test_the_grid_is_that_of_the_ids(base, grid):
    tokenizer = make(base)
    assert tokenizer.grid == grid
    assert jax.eval_shape(lambda images: tokenizer.encode(images), images_for(base)).shape == (2, *grid)
    assert tokenizer.num_codes == 16


def test_code_factorization_is_two_linear_maps_without_bias():
    tokenizer = make()
    assert tokenizer.pre_quant.kernel.shape == (6, 4)
    assert tokenizer.post_quant.kernel.shape == (4, 6)
    assert tokenizer.pre_quant.bias is None
    assert tokenizer.post_quant.bias is None
    images = images_for(VQVAE)
    z, latents = apply(lambda tokenizer: (tokenizer.encoder(images), tokenizer.latents(images)), tokenizer)
    np.testing.assert_allclose(latents, np.asarray(z) @ np.asarray(tokenizer.pre_quant.kernel[...]), atol=1e-5)


@pytest.mark.parametrize("base", [VQVAE, VQGAN], ids=["vqvae", "vqgan"])
def test_the_reconstruction_sends_gradients_to_encoder_and_decoder(base):
    images = images_for(base)
    graph, params, buffers = nnx.split(make(base), nnx.Param, ...)

    def reconstruction_loss(params):
        return l1(nnx.merge(graph, params, buffers)(images).reconstruction, images)

    gradients = dict(nnx.to_flat_state(jit(jax.grad(reconstruction_loss))(params)))
    # A bias before a normalisation of single channels, and a key's in attention, change nothing: theirs is 0.
    without = {path for path, gradient in gradients.items() if not np.abs(gradient[...]).max() > 1e-9}
    assert {path for path in without if path[-1] != "bias"} == {("quantizer", "codebook")}
    if base is VQVAE:
        assert without == {("quantizer", "codebook")}


def test_the_quantizers_loss_sends_gradients_to_encoder_and_codes_only():
    images = images_for(VQVAE)
    graph, params, buffers = nnx.split(make(), nnx.Param, ...)
    gradient = jit(jax.grad(lambda params: nnx.merge(graph, params, buffers)(images).quantized.loss))
    reached = {path for path, gradient in nnx.to_flat_state(gradient(params)) if (gradient[...] != 0.0).any()}
    untouched = set(nnx.to_flat_state(params).paths) - reached
    assert {path[0] for path in reached} == {"encoder", "pre_quant", "quantizer"}
    assert {path[0] for path in untouched} == {"decoder", "post_quant"}


def test_encoder_and_decoder_drop_independently(monkeypatch):
    keys = {}
    for network, method in ((VQGANEncoder, "__call__"), (VQGANDecoder, "features")):
        call = getattr(network, method)

        def spy(self, x, dropout_key=None, call=call):
            keys[type(self)] = dropout_key
            return call(self, x, dropout_key)

        monkeypatch.setattr(network, method, spy)
    tokenizer = make(VQGAN)

    def call(images, key):
        tokenizer(images, key)
        return [jax.random.key_data(keys[network]) for network in (VQGANEncoder, VQGANDecoder)]

    # Both fold the same numbers into their key, and their middles have the same shape: one key would be one mask.
    encoder_key, decoder_key = jit(call)(images_for(VQGAN), jax.random.key(3))
    assert (encoder_key != decoder_key).any()


def test_bfloat16_quantizes_in_float32():
    images = images_for(VQVAE)
    low, high = reconstruct(make(dtype="bfloat16"), images), reconstruct(make(), images)
    assert low.quantized.z_e.dtype == low.reconstruction.dtype == jnp.float32
    error = np.linalg.norm(low.quantized.z_e - high.quantized.z_e) / np.linalg.norm(high.quantized.z_e)
    assert 1e-5 < error < 0.03


@pytest.mark.parametrize("base", [VQVAE, VQGAN], ids=["vqvae", "vqgan"])
def test_token_ids_are_those_of_float32_whatever_the_compute_dtype(base):
    images = images_for(base)
    low, high = make(base | {"dtype": "bfloat16"}), make(base)
    np.testing.assert_array_equal(low.encode(images), high.encode(images))
    assert low.encoder.conv_out.dtype == jnp.bfloat16  # encoding leaves the tokenizer as it was
    assert (np.asarray(low(images).quantized.z_e) != np.asarray(high(images).quantized.z_e)).any()


@pytest.mark.parametrize("base", [VQVAE, VQGAN], ids=["vqvae", "vqgan"])
def test_the_last_layer_makes_the_image_of_the_features(base):
    tokenizer, images = make(base), images_for(base)
    output = tokenizer(images)
    np.testing.assert_allclose(tokenizer.decoder.last_layer(output.features), output.reconstruction, atol=1e-6)


@pytest.mark.parametrize("base", [VQVAE, VQGAN], ids=["vqvae", "vqgan"])
def test_z_channels_may_be_left_to_the_architecture(base):
    arguments = {name: value for name, value in base["architecture_args"].items() if name != "z_channels"}
    tokenizer = nnx.eval_shape(lambda: create(base | {"architecture_args": arguments}))
    assert tokenizer.pre_quant.kernel.shape == (tokenizer.encoder.conv_out.kernel.shape[-1], 4)


# What a caller can get wrong


def test_without_code_factorization_the_widths_must_be_equal():
    with pytest.raises(UserError, match="6 channels and the codes are 4 wide.*code_factorization"):
        nnx.eval_shape(lambda: create(code_factorization=False))


@pytest.mark.parametrize(
    ("field", "choices"),
    [("architecture", "maskgit_vqgan, vqgan, vqvae"), ("quantizer", "bsq, diveq, fsq"), ("dtype", "bfloat16, float32")],
)
def test_unknown_names_list_the_choices(field, choices):
    with pytest.raises(UserError, match=rf"tokenizer\.{field} is 'nonesuch', but must be one of {choices}"):
        nnx.eval_shape(lambda: create(**{field: "nonesuch"}))


def test_an_image_size_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match="image_size 18"):
        create(image_size=18)
