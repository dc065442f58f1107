"""The network's parts against plain formulas, and what must hold whatever its weights are."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as functional
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mast3r_sfm.errors import ShapeError, WeightsError
from mast3r_sfm.models.mast3r.architecture import Architecture, Confidence, Head
from mast3r_sfm.models.mast3r.dpt import DptHead, FusionBlock, Grid
from mast3r_sfm.models.mast3r.network import Network, Points, build_network, check_tensors
from mast3r_sfm.models.mast3r.transformer import (
    Attention,
    CrossAttention,
    LayerNorm,
    Linear,
    Mlp,
    Rotation,
    rotate,
    rotation_table,
)
from tests.networks import network, noise, random_weights, tiny

CPU = torch.device("cpu")
HEADS: tuple[Head, ...] = ("catmlp+dpt", "dpt", "linear")


def plain_rotation(values: Tensor, rows: int, columns: int, base: float) -> Tensor:
    """[T, D] of one head, token by token and channel by channel, by complex numbers."""
    result = torch.empty_like(values, dtype=torch.float64)
    quarter = values.shape[1] // 4
    for token in range(rows * columns):
        for half, position in enumerate(divmod(token, columns)):
            for i in range(quarter):
                low, high = 2 * half * quarter + i, (2 * half + 1) * quarter + i
                turn = position * base ** (-2 * i / (2 * quarter))
                turned = complex(values[token, low], values[token, high]) * complex(math.cos(turn), math.sin(turn))
                result[token, low], result[token, high] = turned.real, turned.imag
    return result


@given(st.integers(1, 5), st.integers(1, 5), st.sampled_from([4, 8, 12, 64]), st.sampled_from([100.0, 10.0, 7.5]))
@settings(max_examples=25)
def test_rotary_positions_are_those_of_the_papers(rows: int, columns: int, width: int, base: float) -> None:
    values = noise(rows * columns, width)
    turned = rotate(values[None, None], rotation_table(rows, columns, width, base, CPU))[0, 0]
    torch.testing.assert_close(turned.double(), plain_rotation(values, rows, columns, base), rtol=0, atol=2e-6)
    torch.testing.assert_close(turned.norm(dim=1), values.norm(dim=1))


places = st.tuples(st.integers(0, 5), st.integers(0, 6))


@given(places, places, places)
def test_a_product_depends_on_the_difference_of_positions_only(
    one: tuple[int, int], other: tuple[int, int], shift: tuple[int, int]
) -> None:
    rows, columns, width = 12, 14, 16
    query, key = noise(2, width, seed=1)
    table = rotation_table(rows, columns, width, 100.0, CPU)

    def product(first: tuple[int, int], second: tuple[int, int]) -> Tensor:
        every = torch.stack([query, key])[:, None, None].expand(2, 1, rows * columns, width)
        turned = rotate(every, table)[:, 0]
        return turned[0, first[0] * columns + first[1]] @ turned[1, second[0] * columns + second[1]]

    moved = product((one[0] + shift[0], one[1] + shift[1]), (other[0] + shift[0], other[1] + shift[1]))
    torch.testing.assert_close(moved, product(one, other), rtol=0, atol=2e-5)


def test_a_product_tells_rows_columns_and_directions_apart() -> None:
    query, key = noise(2, 16, seed=1)
    table = rotation_table(3, 3, 16, 100.0, CPU)
    turned = rotate(torch.stack([query, key])[:, None, None].expand(2, 1, 9, 16), table)[:, 0]
    products = turned[1] @ turned[0, 4]  # the middle one asks
    gaps = (products[:, None] - products).abs() + torch.eye(9)
    assert gaps.min() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_turned_by_exact_angles(dtype: torch.dtype) -> None:
    values = noise(1, 1, 600, 8).to(dtype)
    table = rotation_table(20, 30, 8, 100.0, CPU)
    assert table[0].dtype == torch.float32
    turned = rotate(values, table)
    assert turned.dtype == dtype
    exact = rotate(values.float(), table)
    # One rounding, at the end. An angle of 29 in bfloat16 would be off by up to 0.06.
    assert ((turned.float() - exact).abs() <= exact.abs() * torch.finfo(dtype).eps).all()


def explicit_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[T, D] and [S, D] of one head, in float64."""
    weight = (query.double() @ key.double().T / math.sqrt(query.shape[1])).exp()
    return (weight / weight.sum(dim=1, keepdim=True)) @ value.double()


def turned_head(values: Tensor, head: int, heads: int, rotation: Rotation | None) -> Tensor:
    """Channels [T, D] of one head out of [T, heads · D]."""
    part = values.chunk(heads, dim=1)[head]
    return part if rotation is None else rotate(part[None, None], rotation)[0, 0]


def assert_mixed(found: Tensor, parts: list[Tensor], proj: Linear) -> None:
    expected = torch.cat(parts, dim=1) @ proj.weight.double().T + proj.bias.double()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_self_attention() -> None:
    torch.manual_seed(0)
    layer, tokens, rotation = Attention(24, 3), 3 * noise(1, 6, 24), rotation_table(2, 3, 8, 100.0, CPU)
    query, key, value = (tokens[0] @ layer.qkv.weight.T + layer.qkv.bias).chunk(3, dim=1)
    parts = [
        explicit_attention(
            turned_head(query, head, 3, rotation),
            turned_head(key, head, 3, rotation),
            turned_head(value, head, 3, None),
        )
        for head in range(3)
    ]
    assert_mixed(layer(tokens, rotation)[0], parts, layer.proj)


@pytest.mark.parametrize("grid", [(2, 3), (3, 2), (5, 4)])
@torch.no_grad()
def test_attention_to_another_view(grid: Grid) -> None:
    torch.manual_seed(0)
    layer, tokens, other = CrossAttention(24, 3), 3 * noise(1, 6, 24), 3 * noise(1, grid[0] * grid[1], 24, seed=1)
    mine, theirs = (rotation_table(*shape, 8, 100.0, CPU) for shape in ((2, 3), grid))
    query = tokens[0] @ layer.projq.weight.T + layer.projq.bias
    key, value = (other[0] @ projection.weight.T + projection.bias for projection in (layer.projk, layer.projv))
    parts = [
        explicit_attention(
            turned_head(query, head, 3, mine), turned_head(key, head, 3, theirs), turned_head(value, head, 3, None)
        )
        for head in range(3)
    ]
    assert_mixed(layer(tokens, other, mine, theirs)[0], parts, layer.proj)


@torch.no_grad()
def test_norm_and_mlp() -> None:
    values = 1e-3 * noise(5, 16)  # so small that the epsilon of the norm shows
    centred = values.double() - values.double().mean(dim=1, keepdim=True)
    expected = centred / (centred.square().mean(dim=1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(LayerNorm(16)(values).double(), expected, rtol=1e-4, atol=1e-5)
    torch.manual_seed(0)
    layer, values = Mlp(16, 40, 7), 4 * noise(5, 16)
    hidden = (values @ layer.fc1.weight.T + layer.fc1.bias).double()
    hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    expected = hidden @ layer.fc2.weight.double().T + layer.fc2.bias.double()
    torch.testing.assert_close(layer(values).double(), expected, rtol=0, atol=1e-5)


def test_both_views_read_the_layer_before() -> None:
    net = network()
    first, second = noise(1, 6, 32), noise(1, 4, 32, seed=1)
    turns = [rotation_table(*grid, 8, 100.0, CPU) for grid in ((2, 3), (4, 1))]
    views = [net.decoder_embed(first), net.decoder_embed(second)]
    expected = [[first], [second]]
    for one, two in zip(net.dec_blocks, net.dec_blocks2, strict=True):
        views = [one(views[0], views[1], *turns), two(views[1], views[0], *turns[::-1])]
        expected = [[*before, view] for before, view in zip(expected, views, strict=True)]
    outputs = net.decode(first, second, ((2, 3), (4, 1)))
    for found, wanted in zip(outputs, expected, strict=True):
        assert len(found) == 5
        torch.testing.assert_close(found[:-1], wanted[:-1], rtol=0, atol=0)
        torch.testing.assert_close(found[-1], net.dec_norm(wanted[-1]), rtol=0, atol=0)


def test_a_block_is_made_of_its_parts() -> None:
    net = network()
    tokens, other, rotation = noise(1, 6, 32), noise(1, 6, 24, seed=1), rotation_table(2, 3, 16, 100.0, CPU)
    block = net.enc_blocks[1]
    middle = tokens + block.attn(block.norm1(tokens), rotation)
    torch.testing.assert_close(block(tokens, rotation), middle + block.mlp(block.norm2(middle)))
    block, tokens, rotation = net.dec_blocks[2], noise(1, 6, 24), rotation_table(2, 3, 8, 100.0, CPU)
    middle = tokens + block.attn(block.norm1(tokens), rotation)
    middle = middle + block.cross_attn(block.norm2(middle), block.norm_y(other), rotation, rotation)
    torch.testing.assert_close(block(tokens, other, rotation, rotation), middle + block.mlp(block.norm3(middle)))


def test_encoder_and_decoder_turn_by_heads_of_their_own_width_and_by_the_base() -> None:
    images = noise(1, 3, 32, 48)
    net, other = network(), network(tiny(rope_base=30.0))
    tokens = net.encode(images)
    assert (other.encode(images) - tokens).abs().max() > 1e-3
    outputs = (part.decode(tokens, tokens, ((2, 3), (2, 3)))[0][-1] for part in (net, other))
    assert (next(outputs) - next(outputs)).abs().max() > 1e-3
    expected = net.patch_embed(images)
    for block in net.enc_blocks:
        expected = block(expected, rotation_table(2, 3, 16, 100.0, CPU))
    torch.testing.assert_close(tokens, net.enc_norm(expected), rtol=0, atol=0)


@pytest.mark.parametrize("grid", [(2, 3), (3, 2), (1, 4), (4, 1)])
def test_tokens_and_pixels_are_row_by_row(grid: tuple[int, int]) -> None:
    """Portrait or landscape, one patch of the image makes one token, and one token one patch of the map."""
    net = network(tiny("linear"))
    images = noise(1, 3, 16 * grid[0], 16 * grid[1])
    row, column = grid[0] - 1, grid[1] // 2
    changed = images.clone()
    changed[:, :, 16 * row + 3, 16 * column + 5] += 1
    differs = (net.patch_embed(changed) - net.patch_embed(images)).abs().amax(dim=2)[0] > 1e-6
    assert differs.nonzero().flatten().tolist() == [row * grid[1] + column]

    head, tokens = net.heads[0], noise(1, grid[0] * grid[1], 24)
    moved = tokens.clone()
    moved[:, row * grid[1] + column] += 1
    before, after = (head.points(head.features([some], grid)).confidence[0] for some in (tokens, moved))
    rows, columns = ((after - before).abs() > 0).nonzero().T
    assert before.shape == (16 * grid[0], 16 * grid[1])
    assert {16 * row, 16 * row + 15} <= set(rows.tolist()) <= set(range(16 * row, 16 * row + 16))
    assert {16 * column, 16 * column + 15} <= set(columns.tolist()) <= set(range(16 * column, 16 * column + 16))
    # Within a patch: channel after channel, and inside a channel row after row.
    raw = head.proj(tokens)[0, 0].reshape(4, 16, 16)
    torch.testing.assert_close(head.features([tokens], grid)[0, :, :16, :16], raw, rtol=0, atol=0)


def plain_dpt(head: DptHead, hooks: list[Tensor], grid: tuple[int, int]) -> Tensor:
    """The head as the paper draws it: [B, channels, H, W]."""

    def unit(values: Tensor, part: torch.nn.Module) -> Tensor:
        return values + part.conv2(functional.relu(part.conv1(functional.relu(values))))

    def larger(values: Tensor, size: tuple[int, int]) -> Tensor:
        return functional.interpolate(values, size=size, mode="bilinear", align_corners=True)

    levels = []
    for number, (tokens, reassemble) in enumerate(zip(hooks, head.act_postprocess, strict=True), start=1):
        level = tokens.mT.unflatten(2, grid)
        for part in reassemble:
            level = part(level)
        levels.append(head.scratch.get_submodule(f"layer{number}_rn")(level))
    fused = levels[3]
    for number in (4, 3, 2, 1):
        block, level = head.scratch.get_submodule(f"refinenet{number}"), levels[number - 1]
        if number < 4:
            fused = fused[:, :, : level.shape[2], : level.shape[3]] + unit(level, block.resConfUnit1)
        fused = unit(fused, block.resConfUnit2)
        fused = block.out_conv(larger(fused, (2 * fused.shape[2], 2 * fused.shape[3])))
    smooth, _, sharp, _, last = head.head
    values = larger(smooth(fused), (16 * grid[0], 16 * grid[1]))
    result: Tensor = last(functional.relu(sharp(values)))
    return result


@pytest.fixture(scope="module")
def dpt() -> DptHead:
    return network().heads[1].dpt


grids = st.tuples(st.integers(1, 4), st.integers(1, 5))


@given(grids, st.integers(1, 2))
@settings(max_examples=20)
def test_the_dpt_head_is_that_of_the_paper(dpt: DptHead, grid: tuple[int, int], batch: int) -> None:
    hooks = [
        noise(batch, grid[0] * grid[1], width, seed=width + number) for number, width in enumerate((32, 24, 24, 24))
    ]
    features = dpt.features(hooks, grid)
    assert features.shape == (batch, 8, 8 * grid[0], 8 * grid[1])
    torch.testing.assert_close(dpt.dense(features), plain_dpt(dpt, hooks, grid), rtol=1e-4, atol=1e-5)


@given(st.integers(1, 17), st.integers(1, 17), st.integers(0, 1000))
@settings(max_examples=40)
def test_pixels_one_by_one_equal_the_whole_map(dpt: DptHead, rows: int, columns: int, seed: int) -> None:
    """Borders, corners and maps of a single row included."""
    features = noise(1, 8, rows, columns, seed=seed)
    dense = dpt.dense(features)[0].flatten(1).T
    torch.testing.assert_close(dpt.at(features[0], torch.arange(4 * rows * columns)), dense, rtol=1e-5, atol=1e-5)


def test_pixels_may_be_asked_for_in_any_order_and_often(dpt: DptHead) -> None:
    features = noise(1, 8, 24, 32)
    dense = dpt.dense(features)[0].flatten(1).T
    index = torch.tensor([3071, 0, 5, 5, 63, 64, 0])
    torch.testing.assert_close(dpt.at(features[0], index), dense[index], rtol=1e-5, atol=1e-5)
    assert dpt.at(features[0], index[:0]).shape == (0, 4)


def test_a_convolution_of_single_pixels_may_go_before_the_upsampling() -> None:
    torch.manual_seed(0)
    block = FusionBlock(6)
    level = noise(2, 6, 5, 7)
    upsampled = functional.interpolate(block.resConfUnit2(level), (10, 14), mode="bilinear", align_corners=True)
    torch.testing.assert_close(block(level), block.out_conv(upsampled), rtol=1e-5, atol=1e-5)


def random_images(grids: tuple[Grid, Grid], batch: int) -> list[Tensor]:
    return [noise(batch, 3, 16 * rows, 16 * columns, seed=n) for n, (rows, columns) in enumerate(grids)]


def outputs_of(net: Network, grids: tuple[Grid, Grid], batch: int = 1) -> tuple[list[Tensor], list[Tensor]]:
    """What the decoder gives for random images."""
    images = random_images(grids, batch)
    return net.decode(net.encode(images[0]), net.encode(images[1]), grids)


@pytest.mark.parametrize("kind", HEADS)
def test_points_at_pixels_equal_those_of_the_whole_map(kind: Head) -> None:
    net, grids = network(tiny(kind)), ((3, 2), (2, 5))
    for head, outputs, grid in zip(net.heads, outputs_of(net, grids), grids, strict=True):
        features = head.features([outputs[hook] for hook in head.hooks], grid)
        whole = head.points(features)
        assert whole.xyz.shape == (1, 16 * grid[0], 16 * grid[1], 3)
        index = torch.randperm(256 * grid[0] * grid[1], generator=torch.Generator().manual_seed(0))[:200]
        some = head.points_at(features[0], index)
        expected = whole.xyz[0].flatten(0, 1)[index]
        assert ((some.xyz - expected).norm(dim=1) / expected.norm(dim=1)).max() < 1e-3
        torch.testing.assert_close(some.confidence, whole.confidence[0].flatten()[index], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", HEADS)
def test_each_view_has_a_head_of_its_own(kind: Head) -> None:
    net, grids = network(tiny(kind)), ((2, 2), (2, 2))
    outputs = outputs_of(net, grids)[0]
    found = []
    for head in net.heads:
        mine = [outputs[hook] for hook in head.hooks]
        found.append(head.points(head.features(mine, (2, 2))).confidence)
    assert net.heads == (net.downstream_head1, net.downstream_head2)
    assert (found[0] - found[1]).abs().max() > 0.01


@lru_cache
def linear_network(confidence: Confidence) -> Network:
    return network(tiny("linear", confidence=confidence))


def raw_points(raw: Tensor, confidence: Confidence | None = None) -> Points:
    """Points that a linear head makes of raw outputs [M, 4]."""
    head = linear_network(confidence or Confidence(low=1.0)).heads[0]
    return head.points_at(raw.T[:, None], torch.arange(len(raw)))


@given(st.lists(st.tuples(*[st.floats(-8, 8, width=32)] * 4), min_size=1, max_size=20))
def test_points_lie_where_the_raw_output_points_to(values: list[tuple[float, ...]]) -> None:
    raw = torch.tensor(values)
    points = raw_points(raw)
    distance = raw[:, :3].double().norm(dim=1)
    torch.testing.assert_close(points.xyz.double().norm(dim=1), distance.expm1(), rtol=1e-4, atol=1e-12)
    along = (points.xyz.double() * raw[:, :3]).sum(dim=1)
    torch.testing.assert_close(along, distance.expm1() * distance, rtol=1e-4, atol=1e-12)
    torch.testing.assert_close(points.confidence, 1 + raw[:, 3].exp(), rtol=1e-5, atol=0)


def test_points_at_and_near_the_camera() -> None:
    raw = torch.tensor([[0.0, 0, 0, 0], [1e-15, 0, 0, 0], [0, -1e-6, 0, -100.0]])
    points = raw_points(raw)
    torch.testing.assert_close(points.xyz, raw[:, :3], rtol=1e-5, atol=0)
    assert points.confidence.tolist() == [2, 2, 1]


def test_confidences_stay_in_their_bounds() -> None:
    raw = torch.zeros(3, 4)
    raw[:, 3] = torch.tensor([-50.0, 0.0, 50.0])
    assert raw_points(raw, Confidence(low=0.5, high=4.0)).confidence.tolist() == [0.5, 1.5, 4.0]
    assert raw_points(raw, Confidence(low=3.0)).confidence[1] == 4


def test_descriptors_come_from_the_first_and_the_last_tokens() -> None:
    net = network()
    head, outputs = net.heads[0], outputs_of(net, ((2, 3), (2, 3)))[0]
    hooks = [outputs[hook] for hook in head.hooks]
    values, confidence = head.descriptors(hooks, (2, 3))
    assert values.shape == (1, 32, 48, 8)
    torch.testing.assert_close(values.norm(dim=-1), torch.ones(1, 32, 48))
    raw = head.head_local_features(torch.cat([outputs[0], outputs[4]], dim=2))[0, 5].reshape(9, 16, 16)
    torch.testing.assert_close(confidence[0, 16:, 32:], raw[8].exp())
    torch.testing.assert_close(values[0, 16:, 32:], functional.normalize(raw[:8].permute(1, 2, 0), dim=-1))
    bounded = network(tiny(descriptor_confidence=Confidence(low=0.25, high=1.0))).heads[0]
    torch.testing.assert_close(bounded.descriptors(hooks, (2, 3)).confidence, (0.25 + confidence).clamp(max=1))


@pytest.mark.parametrize("kind", HEADS)
def test_hooks(kind: Head) -> None:
    for depth, hooks in ((4, (0, 2, 3, 4)), (10, (0, 5, 7, 10)), (12, (0, 6, 9, 12))):
        architecture = tiny(kind, decoder_depth=depth)
        with torch.device("meta"):
            head = Network(architecture).heads[0]
        assert head.hooks == ((depth,) if kind == "linear" else hooks)


@pytest.mark.parametrize("kind", HEADS)
def test_a_batch_equals_its_items_one_by_one(kind: Head) -> None:
    net, grids = network(tiny(kind)), ((2, 3), (3, 2))
    together = outputs_of(net, grids, batch=3)
    for number in range(3):
        images = [image[number : number + 1] for image in random_images(grids, batch=3)]
        alone = net.decode(net.encode(images[0]), net.encode(images[1]), grids)
        for head, many, single, grid in zip(net.heads, together, alone, grids, strict=True):
            for layer, tokens in zip(many, single, strict=True):
                torch.testing.assert_close(layer[number : number + 1], tokens, rtol=1e-4, atol=1e-5)
            hooked = [[outputs[hook] for hook in head.hooks] for outputs in (many, single)]
            points = [head.points(head.features(hooks, grid)) for hooks in hooked]
            error = (points[0].xyz[number] - points[1].xyz[0]).norm(dim=-1)
            assert (error / points[1].xyz[0].norm(dim=-1)).max() < 1e-3
            if kind == "catmlp+dpt":
                values = [head.descriptors(hooks, grid).values for hooks in hooked]
                torch.testing.assert_close(values[0][number], values[1][0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [(40, 32), (32, 40), (8, 16), (0, 16), (16, 0)])
def test_sides_that_do_not_fit_the_patches(size: tuple[int, int]) -> None:
    width, height = size
    with pytest.raises(ShapeError, match=rf"{width}×{height} px: sides must be multiples of 16 px"):
        network().encode(torch.zeros(1, 3, height, width))


def test_weights_that_do_not_fit_are_named() -> None:
    tensors = dict(random_weights(tiny()))
    check_tensors(tiny(), tensors)
    del tensors["enc_norm.bias"], tensors["mask_token"]
    tensors["prediction_head.weight"] = torch.zeros(1)
    tensors["decoder_embed.weight"] = tensors["decoder_embed.weight"].T
    for refuse in (check_tensors, build_network):
        with pytest.raises(WeightsError) as caught:
            refuse(tiny(), tensors)
        for part in (
            "2 tensors are missing: enc_norm.bias, mask_token",
            "1 tensors are unknown: prediction_head.weight",
            "1 tensors are of another shape: decoder_embed.weight",
        ):
            assert part in str(caught.value)


def test_of_many_weights_that_do_not_fit_some_are_named() -> None:
    with pytest.raises(WeightsError) as caught:
        check_tensors(tiny(encoder_depth=3), random_weights(tiny()))
    text = str(caught.value)
    assert "12 tensors are missing: enc_blocks.2.attn.proj.bias, " in text
    assert text.count("enc_blocks.2.") == 8
    assert text.endswith("…")
    with pytest.raises(WeightsError, match=r"48 tensors are unknown: dec_blocks\.4\."):
        check_tensors(tiny(), random_weights(tiny(decoder_depth=5)))


def test_weights_are_taken_over_without_a_copy() -> None:
    tensors = random_weights(tiny())
    net = build_network(tiny(), tensors)
    assert net.decoder_embed.weight.data_ptr() == tensors["decoder_embed.weight"].data_ptr()
    assert not net.training
    assert not any(parameter.requires_grad for parameter in net.parameters())
    assert net.downstream_head1.dpt.scratch.layer_rn[2].weight is net.downstream_head1.dpt.scratch.layer3_rn.weight
    halves = build_network(tiny(), {name: tensor.half() for name, tensor in tensors.items()})
    assert {parameter.dtype for parameter in halves.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_for_the_products_of_the_decoder_only(dtype: torch.dtype) -> None:
    exact, net, grids = network(), network(), ((2, 3), (2, 3))
    net.decoder_to(dtype)
    halved = {name for name, parameter in net.named_parameters() if parameter.dtype == dtype}
    blocks = {name for name in net.state_dict() if name.startswith(("dec_blocks.", "dec_blocks2."))}
    assert halved == {name for name in blocks if ".norm" not in name}
    assert len(halved) == 2 * 4 * 2 * (2 + 4 + 2)
    assert all(parameter.dtype == torch.float32 for name, parameter in net.named_parameters() if name not in halved)
    images = noise(1, 3, 32, 48)
    torch.testing.assert_close(net.encode(images), exact.encode(images), rtol=0, atol=0)
    found, wanted = outputs_of(net, grids), outputs_of(exact, grids)
    eps = torch.finfo(dtype).eps
    for some, others in zip(found, wanted, strict=True):
        for tokens, true in zip(some, others, strict=True):
            assert tokens.dtype == torch.float32
            assert (tokens - true).abs().max() < 20 * eps * true.abs().max()
        assert (some[-1] - others[-1]).abs().max() > eps / 20
        # The residual stream is not rounded.
        assert (some[2] != some[2].to(dtype).float()).float().mean() > 0.5


def test_packed_weights_give_the_same() -> None:
    plain, packed, grids = network(), network(), ((2, 3), (3, 2))
    packed.pack_for_cpu()
    layers = [module for module in packed.modules() if isinstance(module, Linear)]
    assert all(layer.weight.is_mkldnn and layer.bias.is_mkldnn for layer in layers)
    assert len(layers) == 2 * 4 + 1 + 2 * 4 * 8 + 2 * 2
    for one, other in zip(outputs_of(plain, grids), outputs_of(packed, grids), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        for head in range(2):
            values = [net.heads[head].descriptors([one[0], one[4]], (2, 3)).values for net in (plain, packed)]
            torch.testing.assert_close(values[0], values[1], rtol=0, atol=1e-5)


def test_layers_of_half_precision_are_not_packed() -> None:
    net = network()
    net.decoder_to(torch.bfloat16)
    net.pack_for_cpu()
    assert not net.dec_blocks2[3].cross_attn.projk.weight.is_mkldnn
    assert net.enc_blocks[0].attn.qkv.weight.is_mkldnn
    assert all(torch.isfinite(tokens).all() for tokens in outputs_of(net, ((1, 2), (1, 2)))[0])


def test_nan_and_overflow_reach_the_outputs() -> None:
    """Nothing replaces them on the way: the model looks at the last tokens only."""
    grids = ((2, 2), (1, 2))
    for spoil in ("dec_blocks.1.mlp.fc1.bias", "enc_blocks.0.norm2.weight"):
        net = network()
        net.get_parameter(spoil).view(-1)[0] = torch.nan
        assert all(outputs[-1].isnan().any() for outputs in outputs_of(net, grids))
    net = network()
    net.get_parameter("dec_blocks2.0.mlp.fc2.weight").fill_(6e4)
    assert all(torch.isfinite(outputs[-1]).all() for outputs in outputs_of(net, grids))
    net.decoder_to(torch.float16)
    assert not any(torch.isfinite(outputs[-1]).all() for outputs in outputs_of(net, grids))


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"encoder_heads": 3}, "encoder: 32 channels do not split into 3 heads of a multiple of four"),
        ({"encoder_heads": 0}, "encoder: 32 channels"),
        ({"decoder_width": 12, "decoder_heads": 2}, "decoder: 12 channels do not split into 2 heads"),
        ({"decoder_width": 0}, "decoder: 0 channels"),
        ({"patch_px": 0}, "must be positive"),
        ({"encoder_depth": 0}, "must be positive"),
        ({"decoder_depth": 0}, "must be positive"),
        ({"image_size_px": 15}, "no smaller than a patch"),
        ({"patch_px": 14}, "a DPT head needs patches of 16 px"),
        ({"decoder_depth": 3}, "a decoder of at least four blocks"),
        ({"descriptor_channels": 0}, r"head of type catmlp\+dpt cannot give 0-d descriptors"),
        ({"head": "linear"}, "head of type linear cannot give 8-d descriptors"),
        ({"head": "dpt"}, "head of type dpt cannot give 8-d descriptors"),
    ],
)
def test_architectures_that_cannot_be(changes: dict[str, object], part: str) -> None:
    with pytest.raises(WeightsError, match=part):
        replace(tiny(), **changes)


def test_the_defaults_are_the_official_mast3r() -> None:
    official = Architecture()
    assert (official.encoder_width, official.encoder_depth, official.encoder_heads) == (1024, 24, 16)
    assert (official.decoder_width, official.decoder_depth, official.decoder_heads) == (768, 12, 12)
    assert official.dpt_hooks == (0, 6, 9, 12)
    assert tiny("linear", patch_px=14, decoder_depth=1).patch_px == 14
