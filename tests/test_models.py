"The networks against an independent computation, under fastai's Learner, and on bad input."
import random
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import Adam

from astromae.blocks import PCMLayer, decay_groups
from astromae.errors import InputError
from astromae.mae import (MAEConfig, MaskedAutoencoder, build_encoder, encoder_weights,
                          load_encoder, patchify, reconstruct)
from astromae.redshift import ARCHITECTURES, RedshiftConfig, RedshiftNetwork, transfer_encoder

SMALL = dict(width=24, depth=2)
SMALL_MAE = dict(decoder_width=24, decoder_depth=1, **SMALL)


def same(before, network):
    "Has no number of the network changed?"
    return all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


# The reference's parameters, by name and shape: width D, decoder width E, patches of p pixels.

def layer_shapes(prefix, D):
    shapes = {"norm1.weight": (D,), "norm1.bias": (D,), "norm2.weight": (D,), "norm2.bias": (D,),
              "attn.qkv.weight": (3*D, D), "attn.qkv.bias": (3*D,),
              "attn.proj.weight": (D, D), "attn.proj.bias": (D,),
              "mlp.fc1.weight": (4*D, D), "mlp.fc1.bias": (4*D,),
              "mlp.fc2.weight": (D, 4*D), "mlp.fc2.bias": (D,)}
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def reference_state(D, depth, E, decoder_depth, p, generator, channels=5, size=32):
    "A checkpoint as the reference implementation names it, with random numbers in it."
    L = (size//p)**2
    shapes = {"cls_token": (1, 1, D), "pos_embed": (1, L + 1, D),
              "patch_embed.proj.weight": (D, channels, p, p), "patch_embed.proj.bias": (D,),
              "norm.weight": (D,), "norm.bias": (D,), "mask_token": (1, 1, E),
              "decoder_pos_embed": (1, L + 1, E),
              "decoder_embed.weight": (E, D), "decoder_embed.bias": (E,),
              "decoder_norm.weight": (E,), "decoder_norm.bias": (E,),
              "decoder_pred.weight": (p*p*channels, E), "decoder_pred.bias": (p*p*channels,)}
    for k in range(depth): shapes |= layer_shapes(f"blocks.{k}", D)
    for k in range(decoder_depth): shapes |= layer_shapes(f"decoder_blocks.{k}", E)
    return {name: 0.2*torch.randn(shape, generator=generator) for name, shape in shapes.items()}


# The loss from the specification and the state alone, one image at a time, in plain operations.

def norm(x, state, name):
    centred = x - x.mean(dim=-1, keepdim=True)
    scaled = centred/(centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
    return scaled*state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(x, state, name): return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def transformer_layer(x, state, name, heads):
    D = x.shape[-1]
    q, k, v = linear(norm(x, state, f"{name}.norm1"), state, f"{name}.attn.qkv").split(D, dim=-1)
    given = []
    for own in torch.arange(D).chunk(heads):
        weights = (q[:, own] @ k[:, own].T/len(own)**0.5).softmax(dim=-1)
        given.append(weights @ v[:, own])
    x = x + linear(torch.cat(given, dim=-1), state, f"{name}.attn.proj")
    hidden = F.gelu(linear(norm(x, state, f"{name}.norm2"), state, f"{name}.mlp.fc1"))
    return x + linear(hidden, state, f"{name}.mlp.fc2")


def loss_by_hand(state, images, noise, p, heads, decoder_heads, mask_ratio, norm_pix_loss):
    depth, decoder_depth = (len({name.split(".")[1] for name in state if name.startswith(kind)})
                            for kind in ("blocks.", "decoder_blocks."))
    errors = []
    for image, numbers in zip(images, noise):
        S, L = image.shape[-1], len(numbers)
        cut = [image[:, y:y + p, x:x + p] for y in range(0, S, p) for x in range(0, S, p)]
        visible = numbers.argsort()[:int(L*(1 - mask_ratio))].tolist()
        kernel = state["patch_embed.proj.weight"].flatten(1)
        tokens = [state["cls_token"][0, 0] + state["pos_embed"][0, 0]]
        tokens += [kernel @ cut[k].flatten() + state["patch_embed.proj.bias"]
                   + state["pos_embed"][0, 1 + k] for k in visible]
        x = torch.stack(tokens)
        for k in range(depth): x = transformer_layer(x, state, f"blocks.{k}", heads)
        x = linear(norm(x, state, "norm"), state, "decoder_embed")
        full = state["mask_token"][0].repeat(L + 1, 1)
        full[0] = x[0]
        for place, token in zip(visible, x[1:]): full[1 + place] = token
        x = full + state["decoder_pos_embed"][0]
        for k in range(decoder_depth):
            x = transformer_layer(x, state, f"decoder_blocks.{k}", decoder_heads)
        predicted = linear(norm(x, state, "decoder_norm"), state, "decoder_pred")[1:]
        for k in set(range(L)) - set(visible):
            target = cut[k].permute(1, 2, 0).flatten()  # rows, columns, bands
            if norm_pix_loss: target = (target - target.mean())/(target.var() + 1e-6).sqrt()
            errors.append((predicted[k] - target).square().mean())
    return torch.stack(errors).mean()


@pytest.mark.parametrize("p", [4, 8])
@pytest.mark.parametrize("norm_pix_loss", [False, True])
@pytest.mark.parametrize("mask_ratio", [0.75, 0.5])
def test_loss_agrees_with_plain_operations(p, norm_pix_loss, mask_ratio):
    generator = torch.Generator().manual_seed(p)
    state = reference_state(24, 3, 16, 2, p, generator)
    config = MAEConfig(encoder="plain", patch_size=p, width=24, depth=3, heads=3, decoder_width=16,
                       decoder_depth=2, decoder_heads=2, mask_ratio=mask_ratio,
                       norm_pix_loss=norm_pix_loss)
    mae = MaskedAutoencoder(config)
    mae.load_state_dict(state, strict=True)
    images = torch.randn(3, 5, 32, 32, generator=generator)
    noise = torch.rand(3, config.grid**2, generator=generator)
    expected = loss_by_hand(state, images, noise, p, 3, 2, mask_ratio, norm_pix_loss)
    assert abs(mae(images, noise)[0] - expected).item() < 1e-5*max(1, expected.item())


@pytest.mark.parametrize("p", [4, 8])
def test_paper_sizes_load_strictly_and_agree(p):
    generator = torch.Generator().manual_seed(0)
    state = reference_state(192, 12, 192, 4, p, generator)
    for tensor in state.values(): tensor *= 0.1
    mae = MaskedAutoencoder(MAEConfig(encoder="plain", patch_size=p))
    mae.load_state_dict(state, strict=True)
    images = torch.randn(2, 5, 32, 32, generator=generator)
    noise = torch.rand(2, (32//p)**2, generator=generator)
    expected = loss_by_hand(state, images, noise, p, 3, 3, 0.75, False)
    assert abs(mae(images, noise)[0] - expected).item() < 1e-5


@pytest.mark.parametrize("kind,way", [("plain", "grid"), ("pcm", "grid"), ("pcm", "kernel1")])
@pytest.mark.parametrize("p", [4, 8])
def test_order_of_tokens_does_not_matter(kind, way, p):
    "The noise decides which patches are seen; in which order it puts them changes nothing."
    config = MAEConfig(encoder=kind, pcm_masking=way, patch_size=p, **SMALL_MAE)
    mae = MaskedAutoencoder(config).eval()
    images, noise = torch.randn(2, 5, 32, 32), torch.rand(2, (32//p)**2)
    seen = noise <= noise.kthvalue(noise.shape[1]//4, dim=1, keepdim=True).values
    turned = torch.where(seen, noise.min() - noise, noise)
    with torch.no_grad(): first, second = mae(images, noise)[1], mae(images, turned)[1]
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


def test_generator_and_global_seed_repeat():
    mae, images = MaskedAutoencoder(MAEConfig(**SMALL_MAE)).eval(), torch.randn(2, 5, 32, 32)
    masks = [mae(images, generator=torch.Generator().manual_seed(seed))[2] for seed in (3, 3, 4)]
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    assert mae(images, mask_ratio=0.5)[2].sum(dim=1).tolist() == [8, 8]


def test_reconstruction_leaves_the_model_alone_and_undoes_normalisation():
    mae = MaskedAutoencoder(MAEConfig(norm_pix_loss=True, **SMALL_MAE)).train()
    before = {name: tensor.clone() for name, tensor in mae.state_dict().items()}
    images, noise = 3 + 2*torch.randn(4, 5, 32, 32), torch.rand(4, 16)
    painted = patchify(reconstruct(mae, images, noise), 8)
    assert mae.training and same(before, mae)
    loss, _, mask = mae.eval()(images, noise)
    true = patchify(images, 8)
    variance = true.var(dim=-1)
    error = ((painted - true).square().mean(dim=-1)/(variance + 1e-6)*mask).sum()/mask.sum()
    torch.testing.assert_close(error, loss.detach(), rtol=1e-4, atol=1e-5)


def test_bfloat16_autocast():
    images, magnitudes = torch.randn(2, 5, 32, 32), torch.randn(2, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for way in ("grid", "kernel1"):
            MaskedAutoencoder(MAEConfig(pcm_masking=way, **SMALL_MAE))(images)[0].backward()
        RedshiftNetwork(RedshiftConfig(**SMALL))(images, magnitudes).sum().backward()


NAMES = """from-scratch plain-ViT-magnitude, from-scratch pcm-ViT-magnitude, Henghes et al.,
from-scratch plain-ViT, from-scratch pcm-ViT, Inception-only, plain-ViT-magnitude,
pcm-ViT-magnitude, plain-AstroMAE, pcm-AstroMAE, plain-ViT, pcm-ViT, plain-ViT-inception, pcm-ViT-inception"""


def test_all_fourteen_are_there():
    assert list(ARCHITECTURES) == [name.strip() for name in NAMES.replace("\n", " ").split(",")]
    for name, config in ARCHITECTURES.items():
        kind = "pcm" if "pcm" in name else "plain" if "plain" in name else "none"
        inception = any(word in name for word in ("AstroMAE", "inception", "Inception", "Henghes"))
        magnitude = any(word in name for word in ("AstroMAE", "magnitude", "Henghes"))
        assert config.encoder == kind, name
        assert (config.inception, config.magnitude) == (inception, magnitude), name
        assert config.frozen == ("scratch" not in name), name
    linear = [m for m in RedshiftNetwork(ARCHITECTURES["Inception-only"]).modules()
              if isinstance(m, torch.nn.Linear)]
    assert len(linear) == 3


@pytest.mark.parametrize("p", [4, 8])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_one_step_moves_what_is_trained_and_nothing_else(name, p):
    torch.manual_seed(0)
    network = RedshiftNetwork(replace(ARCHITECTURES[name], depth=2, patch_size=p))
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    images, magnitudes, redshifts = torch.randn(8, 5, 32, 32), torch.randn(8, 5), torch.rand(8)
    optimizer = torch.optim.AdamW(sum(decay_groups(network), []), lr=1e-3)
    (network(images, magnitudes) - redshifts).square().mean().backward()
    optimizer.step()
    after = network.state_dict()
    fixed = {key for key in before if torch.equal(before[key], after[key])}
    expected = {key for key in before if key.startswith("encoder.") and network.config.frozen}
    if not network.config.frozen: expected = {"encoder.pos_embed"}
    assert fixed == expected


class Batches:
    "Three batches of noise, as a loader."
    def __init__(self, bs=8):
        generator = torch.Generator().manual_seed(0)
        draw = partial(torch.randn, generator=generator)
        self.batches = [(draw(bs, 5, 32, 32), draw(bs, 5), draw(bs)) for _ in range(3)]
        self.bs, self.device, self.dataset = bs, torch.device("cpu"), range(3*bs)

    def __len__(self): return len(self.batches)

    def __iter__(self): return iter(self.batches)

    def to(self, device): return self


class WatchEncoder(Callback):
    def after_pred(self): assert not self.model.encoder.training


@pytest.mark.parametrize("name", ["pcm-AstroMAE", "plain-ViT"])
def test_frozen_under_fastai(name, tmp_path):
    network = RedshiftNetwork(replace(ARCHITECTURES[name], depth=2))
    before = {key: tensor.clone() for key, tensor in network.encoder.state_dict().items()}
    head = network.join[0].weight.clone()
    learner = Learner(DataLoaders(Batches(), Batches()), network, loss_func=torch.nn.MSELoss(),
                      opt_func=partial(Adam, sqr_mom=0.999), splitter=decay_groups, wd=[0.005, 0.],
                      path=tmp_path, cbs=WatchEncoder())
    with learner.no_logging(): learner.fit(2, lr=1e-3)
    assert same(before, network.encoder)
    assert not torch.equal(head, network.join[0].weight)
    assert [hyper["wd"] for hyper in learner.opt.hypers] == [0.005, 0.]


def test_what_decays():
    mae = MaskedAutoencoder(MAEConfig(**SMALL_MAE))
    names = {id(parameter): name for name, parameter in mae.named_parameters()}
    decayed, spared = ([names[id(parameter)] for parameter in group] for group in decay_groups(mae))
    assert all(name.endswith("weight") and "norm" not in name for name in decayed)
    assert {"cls_token", "mask_token", "norm.weight", "blocks.0.pcm.1.weight"} <= set(spared)
    assert set(names.values()) - set(decayed) - set(spared) == {"pos_embed", "decoder_pos_embed"}
    network = RedshiftNetwork(RedshiftConfig(**SMALL))
    trained = {id(parameter) for group in decay_groups(network) for parameter in group}
    assert not trained & {id(parameter) for parameter in network.encoder.parameters()}


def test_pretrained_round_trip_is_strict_and_without_pickle(tmp_path):
    network = RedshiftNetwork(RedshiftConfig(redshift_mean=0.1, **SMALL)).eval()
    network.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors", ".md"}
    again = RedshiftNetwork.from_pretrained(tmp_path)
    images, magnitudes = torch.randn(2, 5, 32, 32), torch.randn(2, 5)
    assert torch.equal(again(images, magnitudes), network(images, magnitudes))
    with pytest.raises(RuntimeError, match="Missing key|Unexpected key"):
        MaskedAutoencoder.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="pickle"):
        RedshiftNetwork._load_as_pickle(network, "pytorch_model.bin", "cpu", True)


@pytest.mark.parametrize("p", [4, 8])
def test_kernel1_becomes_3x3_in_the_network(p):
    mae = MaskedAutoencoder(MAEConfig(pcm_masking="kernel1", patch_size=p, **SMALL_MAE)).train()
    for _ in range(3): mae(torch.randn(16, 5, 32, 32))
    network = transfer_encoder(mae, RedshiftNetwork(RedshiftConfig(patch_size=p, **SMALL)))
    images = torch.randn(4, 5, 32, 32)
    torch.testing.assert_close(network.embed(images), mae.eval().embed(images).detach())
    assert network.encoder.blocks[0].pcm[0].weight.shape[2:] == (3, 3)


def test_loading_names_what_is_missing_or_left_over():
    config = MAEConfig(**SMALL_MAE)
    weights = encoder_weights(MaskedAutoencoder(config))
    for name in random.Random(0).sample(sorted(weights), 5):
        less = {key: tensor for key, tensor in weights.items() if key != name}
        with pytest.raises(InputError, match=f"{name}.*only the encoder"):
            load_encoder(build_encoder(config), less)
    with pytest.raises(InputError, match="fc_norm.weight.*only the weights"):
        load_encoder(build_encoder(config), {**weights, "fc_norm.weight": torch.ones(24)})
    assert not any(name.startswith(("norm.", "mask_token", "decoder")) for name in weights)


@pytest.mark.parametrize("settings,sentence", [
    (dict(patch_size=5), "patches of 5 pixels"), (dict(patch_size=0), "above zero"),
    (dict(heads=0), "above zero"), (dict(width=30, heads=3), "multiple of 4"),
    (dict(encoder="none"), "plain or pcm"), (dict(mask_ratio=1.), "leaves 0 of 16"),
    (dict(mask_ratio=0.), "leaves 16 of 16"), (dict(decoder_heads=5), "decoder_width"),
    (dict(pcm_masking="kernel3"), "grid or kernel1")])
def test_impossible_configurations(settings, sentence):
    with pytest.raises(InputError, match=sentence): MAEConfig(**settings)


@pytest.mark.parametrize("groups", [0, 5, -1])
def test_impossible_groups(groups):
    with pytest.raises(InputError, match="do not divide"): PCMLayer(24, 3, 4, groups=groups)


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (2, 5, 64, 64), (2, 5, 32, 31)])
def test_images_of_another_shape(shape):
    for network in (MaskedAutoencoder(MAEConfig(**SMALL_MAE)),
                    RedshiftNetwork(RedshiftConfig(magnitude=False, **SMALL))):
        with pytest.raises(InputError, match="do not fit a network made for"):
            network(torch.zeros(shape))
