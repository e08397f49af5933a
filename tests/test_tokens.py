"""Token grids: the outputs of transformers that are maps, in PyTorch.

The oracle is the module itself: its own tokens, reshaped by hand, and autograd on them.
"""

import numpy as np
import pytest
from expecting import raises

import convscope
from convscope.errors import UsageError
from convscope.techniques.heatmaps import Occlusion

torch = pytest.importorskip("torch")
import transformers_torch as at_hand  # noqa: E402
from transformers_torch import GRID, PATCH, SIDE, WIDTH, ViT, seeded  # noqa: E402

pytestmark = pytest.mark.without_keras
RNG = np.random.default_rng(5)
PHOTO = RNG.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def opened(module):
    return convscope.open_model(module, size=SIDE, preprocess="0..1")


def prepared():
    """The image as the module takes it."""
    return torch.tensor(PHOTO / 255, dtype=torch.float32).permute(2, 0, 1)[None]


def kept(module, child):
    """The logits of the module and the output of one of its children, whose gradient is kept."""
    seen = []

    def keep(_, __, output):
        output.retain_grad()
        seen.append(output)

    hook = child.register_forward_hook(keep)
    logits = module(prepared().requires_grad_())
    hook.remove()
    return logits, seen[0]


def gradient_maps(module, child, target, grid_of):
    """Map and gradient `(h, w, c)` of a child for one class, by autograd; `grid_of` takes `(tokens, c)` to the grid."""
    logits, output = kept(module, child)
    logits[0, target].backward()
    values, gradients = output.detach(), output.grad
    values, gradients = (x[0] if len(x) == 1 else x[:, 0] for x in (values, gradients))
    return grid_of(values).numpy(), grid_of(gradients).numpy()


def after(front):
    """Takes `front` tokens off, and what is behind the grid, and makes the rest a grid."""
    return lambda tokens: tokens[front : front + GRID**2].reshape(GRID, GRID, -1)


def grad_cam(maps, gradients):
    return np.maximum((gradients.mean((0, 1)) * maps).sum(-1), 0)


KINDS = {
    "class token": {"front": 1},
    "class and register tokens in front": {"front": 3},
    "registers behind": {"front": 1, "behind": 2},
    "no token but the grid": {"front": 0},
    "fused attention": {"attention": at_hand.FusedAttention},
    "nn.MultiheadAttention": {"attention": at_hand.ModuleAttention},
}


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_blocks_have_the_map_of_their_tokens(options):
    module = seeded(ViT(**options))
    network = opened(module)
    layer = network.layer("blocks.1")
    front, behind = options.get("front", 1), options.get("behind", 0)
    assert layer.spatial
    assert layer.shape == (GRID, GRID, WIDTH)
    assert (layer.tokens.grid, layer.tokens.front, layer.tokens.behind) == ((GRID, GRID), front, behind)
    maps, gradients = gradient_maps(module, module.blocks[1], 2, after(front))
    result = convscope.activations(network, PHOTO, layers="blocks.1")
    np.testing.assert_allclose(result.arrays["blocks.1"][0], maps, rtol=1e-5, atol=1e-5)
    found = convscope.heatmap(network, PHOTO, 2, layer="blocks.1", method="grad-cam")
    np.testing.assert_allclose(np.maximum(found.maps[0], 0), grad_cam(maps, gradients), rtol=1e-4, atol=1e-6)


def test_cells_are_found_where_tokens_go_column_by_column():
    module = seeded(ViT(columns=True))
    maps, gradients = gradient_maps(
        module, module.blocks[0], 1, lambda tokens: tokens[1:].reshape(GRID, GRID, -1).transpose(0, 1)
    )
    found = convscope.heatmap(opened(module), PHOTO, 1, layer="blocks.0", method="hirescam")
    np.testing.assert_allclose(found.maps[0], (maps * gradients).sum(-1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_the_automatic_layer_is_the_last_whose_grid_is_read(options):
    network = opened(seeded(ViT(**options)))
    assert network.last_spatial_layer().path == ("norm" if options.get("front", 1) == 0 else "blocks.2.norm1")


@pytest.mark.parametrize("choice", ["auto", "best"])
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_a_heatmap_without_a_layer_is_made_at_the_last_whose_grid_is_read(options, choice):
    module = seeded(ViT(**options))
    row = convscope.heatmap(opened(module), PHOTO, 2, choice, method="layercam").rows[0]
    layer = "norm" if options.get("front", 1) == 0 else "blocks.2.norm1"
    assert (row.layer, row.status) == (layer, "ok")


def test_a_channel_is_explained_at_the_last_layer_before_it_whose_grid_the_class_does_not_read():
    row = convscope.heatmap(opened(seeded(ViT())), PHOTO, "norm:3", method="layercam").rows[0]
    assert (row.layer, row.status) == ("blocks.2.add#1", "ok")


def test_the_last_grid_that_is_read_is_another_one_after_the_weights_changed():
    """Without its last attention, the class token reads the grid in the attention before it for the last time."""
    module = seeded(ViT())
    network = opened(module)
    weights = network.weights()
    names = [name for name, _ in module.named_parameters()]
    without = [
        np.zeros_like(weight) if name.startswith("blocks.2.attn.proj") else weight
        for name, weight in zip(names, weights, strict=True)
    ]
    layers = [network.last_spatial_layer().path]
    with network.replaced(without):
        layers.append(convscope.heatmap(network, PHOTO, 2, method="layercam").rows[0].layer)
    layers.append(network.last_spatial_layer().path)
    with torch.no_grad():
        for parameter in module.blocks[2].attn.proj.parameters():
            parameter.zero_()
    layers.append(convscope.heatmap(network, PHOTO, 2, method="layercam").rows[0].layer)
    assert layers == ["blocks.2.norm1", "blocks.1.norm1"] * 2


def test_tokens_whose_number_depends_on_the_image_are_no_grid():
    """The trial that looks for a grid fails, and opening does not: the blank image has another number of them."""

    class Dropping(ViT):
        def forward(self, x):
            count = 10 if x.max() == 0 else 13
            x = self.tokens(x)
            x = x[:, x[0].sum(-1).topk(count).indices]
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x).mean(1))

    network = opened(seeded(Dropping()))
    row = convscope.heatmap(network, PHOTO, 1, method="layercam").rows[0]
    assert (network.layer(row.layer).shape, row.status) == ((GRID, GRID, WIDTH), "ok")
    assert not network.layer("blocks.2").spatial


def test_a_block_after_which_only_the_class_token_is_read_says_so():
    row = convscope.heatmap(opened(seeded(ViT())), PHOTO, 2, layer="blocks.2", method="grad-cam").rows[0]
    assert row.status == "blank"
    assert "class token" in row.reason
    assert "'blocks.2.norm1'" in row.reason


def test_heads_of_an_attention_are_no_maps():
    network = opened(seeded(ViT()))
    for path in ("blocks.0.attn.softmax", "blocks.0.attn.matmul#1", "blocks.0.attn.permute"):
        assert not network.layer(path).spatial
    with raises(UsageError, "layer-without-map", layer="blocks.0.attn.softmax", match="occlusion"):
        convscope.heatmap(network, PHOTO, 2, layer="blocks.0.attn.softmax")
    with raises(UsageError, "layer-without-channels", layer="blocks.0.attn.softmax"):
        convscope.filters(network, "blocks.0.attn.softmax", [0], steps=1)


@pytest.mark.parametrize(
    "method", ["grad-cam", "grad-cam++", "layercam", "xgrad-cam", "score-cam", "ablation-cam", "eigen-cam"]
)
def test_methods_at_a_layer_work_at_blocks(method):
    found = convscope.heatmap(opened(seeded(ViT())), PHOTO, 2, layer="blocks.1", method=method)
    assert found.maps[0].shape == (GRID, GRID)
    assert np.isfinite(found.maps[0]).all()
    assert found.maps[0].any()


def test_ablation_replays_the_grid_and_keeps_the_class_token():
    module = seeded(ViT())
    logits, output = kept(module, module.blocks[1])
    x, y = output.detach(), logits[0, 2].item()

    def without(channel):
        changed = x.clone()
        changed[:, 1:, channel] = 0
        return module.head(module.norm(module.blocks[2](changed))[:, 0])[0, 2].item()

    weights = np.array([(y - without(channel)) / abs(y) for channel in range(WIDTH)])
    expected = (weights * after(1)(x[0]).numpy()).sum(-1)
    found = convscope.heatmap(opened(module), PHOTO, 2, layer="blocks.1", method="ablation-cam")
    np.testing.assert_allclose(found.maps[0], expected, rtol=1e-3, atol=1e-5)


def test_a_filter_is_the_mean_over_the_grid_without_its_border():
    module = seeded(ViT())
    result = convscope.filters(opened(module), "blocks.0", [3], recipe="classic", size=SIDE, steps=2)
    canvas = torch.tensor(result.values[0]).permute(2, 0, 1)[None].float()
    seen = []
    module.blocks[0].register_forward_hook(lambda _, __, output: seen.append(output))
    module(canvas)
    expected = after(1)(seen[0].detach()[0])[1:-1, 1:-1, 3].mean().item()
    assert result.rows[0].activation == pytest.approx(expected, rel=1e-3)


def test_saved_results_know_the_tokens_of_their_layers(tmp_path):
    network = opened(seeded(ViT(front=2, behind=1)))
    convscope.save(convscope.activations(network, PHOTO, layers="blocks.*"), tmp_path)
    loaded = convscope.load(tmp_path)
    assert loaded.layers == tuple(network.select("blocks.*"))
    assert [layer.tokens.behind for layer in loaded.layers if layer.path == "blocks.1"] == [1]


def test_a_windowed_transformer_has_maps_at_each_stage():
    module = seeded(at_hand.Swin())
    network = opened(module)
    stages = {"stage1": (GRID, GRID, WIDTH), "stage2": (GRID // 2, GRID // 2, 2 * WIDTH)}
    for path, shape in stages.items():
        assert network.layer(path).spatial
        assert network.layer(path).shape == shape
        output = kept(module, getattr(module, path))[1].detach()[0]
        found = convscope.activations(network, PHOTO, layers=path).arrays[path][0]
        np.testing.assert_allclose(found, output.reshape(shape).numpy(), rtol=1e-5, atol=1e-5)
    assert not network.layer("stage1.0.attn.softmax").spatial
    assert network.last_spatial_layer().path == "norm"


def test_a_swin_with_channels_last_has_maps_at_each_stage():
    module = seeded(at_hand.Swin(maps=True))
    network = opened(module)
    maps, gradients = gradient_maps(module, module.stage2, 3, lambda output: output)
    found = convscope.heatmap(network, PHOTO, 3, layer="stage2", method="grad-cam")
    assert network.layer("stage2").shape == (GRID // 2, GRID // 2, 2 * WIDTH)
    assert not network.layer("stage1.0.attn.softmax").spatial
    np.testing.assert_allclose(np.maximum(found.maps[0], 0), grad_cam(maps, gradients), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("make", [at_hand.Hybrid, at_hand.Linear], ids=["convolutions first", "linear patches"])
def test_tokens_of_other_stems_are_a_grid(make):
    module = seeded(make())
    maps, gradients = gradient_maps(module, module.blocks[0], 1, after(1))
    found = convscope.heatmap(opened(module), PHOTO, 1, layer="blocks.0", method="layercam")
    expected = (np.maximum(gradients, 0) * maps).sum(-1)
    np.testing.assert_allclose(found.maps[0], expected, rtol=1e-4, atol=1e-6)


def test_a_class_token_that_joins_late_is_told_apart():
    module = seeded(at_hand.LateClassToken())
    network = opened(module)
    assert [network.layer(f"blocks.{number}").tokens.others for number in range(3)] == [0, 0, 1]
    maps, gradients = gradient_maps(module, module.blocks[1], 1, after(0))
    found = convscope.heatmap(network, PHOTO, 1, layer="blocks.1", method="grad-cam")
    np.testing.assert_allclose(np.maximum(found.maps[0], 0), grad_cam(maps, gradients), rtol=1e-4, atol=1e-6)
    assert network.last_spatial_layer().path == "blocks.2.norm1"


def test_tokens_that_were_maps_between_have_the_grid_of_those():
    module = seeded(at_hand.Pyramid())
    network = opened(module)
    assert network.layer("merge").shape == network.layer("blocks.1").shape == (GRID // 2, GRID // 2, WIDTH)
    output = kept(module, module.blocks[1])[1].detach()[0]
    found = convscope.activations(network, PHOTO, layers="blocks.1").arrays["blocks.1"][0]
    np.testing.assert_allclose(found, output.reshape(GRID // 2, GRID // 2, WIDTH).numpy(), rtol=1e-5, atol=1e-5)


def test_tokens_are_told_from_as_many_channels():
    module = seeded(at_hand.Mixer())
    network = opened(module)
    assert network.layer("blocks.0.over_tokens").tokens is None
    maps, gradients = gradient_maps(module, module.blocks[0], 1, after(0))
    found = convscope.heatmap(network, PHOTO, 1, layer="blocks.0", method="hirescam")
    np.testing.assert_allclose(found.maps[0], (maps * gradients).sum(-1), rtol=1e-4, atol=1e-6)
    maps = kept(module, module.blocks[1].over_channels)[1].detach()[0].reshape(GRID, GRID, -1)
    found = convscope.activations(network, PHOTO, layers="blocks.1.over_channels").arrays["blocks.1.over_channels"][0]
    np.testing.assert_allclose(found, maps.numpy(), rtol=1e-5, atol=1e-5)


def test_tokens_before_images_are_a_grid():
    module = seeded(at_hand.SequenceFirst())
    network = opened(module)
    assert network.layer("blocks.0").tokens.images_second
    maps, gradients = gradient_maps(module, module.blocks[0], 1, lambda tokens: tokens)
    maps, gradients = (x[1:].reshape(GRID, GRID, -1) for x in (maps, gradients))
    found = convscope.heatmap(network, [PHOTO, 255 - PHOTO], 1, layer="blocks.0", method="grad-cam")
    np.testing.assert_allclose(np.maximum(found.maps[0], 0), grad_cam(maps, gradients), rtol=1e-4, atol=1e-6)
    assert convscope.heatmap(network, PHOTO, 1, layer="blocks.0", method="ablation-cam").maps[0].any()
    assert network.last_spatial_layer().path == "blocks.0.norm2"


def test_tokens_that_see_the_whole_image_have_no_map():
    network = opened(seeded(at_hand.Mixed()))
    for path in ("mixing", "blocks.0", "norm"):
        assert network.layer(path).tokens is None
    with raises(UsageError, "layer-without-map", layer="blocks.0", match="occlusion, rise and saliency"):
        convscope.heatmap(network, PHOTO, 1, layer="blocks.0")
    for method in ("occlusion", "saliency"):
        assert np.isfinite(convscope.heatmap(network, PHOTO, 1, method=method).maps[0]).all()


def test_blocks_at_another_size_have_the_map_of_that_size():
    network = opened(seeded(at_hand.AnySize()))
    layer = {layer.path: layer for layer in network.layers_at((2 * SIDE, SIDE))}["blocks.0"]
    assert layer.shape == (2 * GRID, GRID, WIDTH)
    assert (layer.tokens.front, layer.tokens.others) == (1, 1)
    result = convscope.filters(network, "blocks.0", [3], recipe="classic", size=2 * SIDE, steps=1)
    assert np.isfinite(result.rows[0].activation)


def test_occlusion_and_grad_cam_agree_where_the_class_lies():
    """A transformer set by hand whose score is the red of the image, gathered by the class token."""
    module = at_hand.red_counter()
    photo = np.full((SIDE, SIDE, 3), 60, np.uint8)
    photo[8:16, 16:24] = (255, 0, 0)
    network = opened(module)
    cam = convscope.heatmap(network, photo, 0, layer="blocks.0.norm1", method="grad-cam").maps[0]
    occluded = convscope.heatmap(network, photo, 0, method=Occlusion(PATCH, PATCH)).maps[0]
    assert np.unravel_index(cam.argmax(), cam.shape) == (1, 2)
    row, column = np.unravel_index(occluded.argmax(), occluded.shape)
    assert (row * GRID // occluded.shape[0], column * GRID // occluded.shape[1]) == (1, 2)


def test_what_is_read_after_the_class_token_is_explained_where_the_grid_has_an_effect():
    """A similarity, a channel and a sum: their last map by order is one whose grid nothing after it reads."""
    network = opened(seeded(ViT(front=1)))
    chosen = convscope.heatmap(network, PHOTO, 2, method="layercam").rows[0].layer
    similar = convscope.techniques.heatmaps.similarity_target(network, PHOTO)
    for target in ("head:0", "class:0 + head:1", similar):
        found = convscope.heatmap(network, PHOTO, target, method="layercam")
        assert found.rows[0].layer == chosen
        assert found.maps.any()  # as a map without a gradient is not
