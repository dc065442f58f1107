"""Exact nearest neighbours in a map of descriptors that change slowly over the image, without comparing everything.

The map is cut into blocks of 8×8 pixels. All descriptors d of a block lie within a radius r of its centre c. A query q
whose nearest descriptor so far is a distance t away needs a block only where |q - c| ≤ t + r: distances obey the
triangle inequality, for unit descriptors compared by product too, where |q - d|² = 2 - 2 q·d. Blocks that are left are
compared pixel by pixel in float32; pixels whose float32 score may be the largest, in float64 as `exhaustive` says.
Every bound allows for rounding, so the result is that of `exhaustive`, ties included. Where little can be ruled out,
whole products are taken; where too much is tied, all is compared in float64.

Choices measured on the maps of benchmarks/matching.py (noisy, 3,072 blocks, one thread): the ball leaves 2.6 % of the
blocks to a query, and 2.3 % if its nearest descriptor were known beforehand; the bound on the product itself,
q·d ≤ q·c + |q| r, leaves 12 %; a rectangle along the two main directions of the block's descriptors plus a ball around
it leaves 0.9 %, but needs three products for each bound, which costs more than it saves. With blocks of 4×4 pixels a
search takes 2.4 times as long, with 12×12 and 16×16 about as long or 1.2 times.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, log2

import torch
from torch import Tensor

from mast3r_sfm.errors import ShapeError
from mast3r_sfm.matching.exhaustive import nearest_exhaustive, score_pairs

BLOCK_PX = 8
DENSE_SHARE = 0.4
"""Share of pairs of query and block from which one whole product is faster than the product of each pair."""
CROWDED_SHARE = 1 / 16
"""Share of the blocks from which float64 scores of all pixels are faster than those of the candidates."""
ELEMENTS_AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 25}
"""Scores in one step: what stays in the cache, or what keeps a GPU busy."""
CANDIDATES_AT_ONCE = 1 << 11
"""Blocks whose pixels are compared once more in one step."""
LEAST_NORM = 2.0**-50
"""Added to every norm: where squares underflow in float32, norms and errors are not relative."""


@dataclass(frozen=True, kw_only=True)
class BlockBounds:
    """What rules blocks out: a ball around the descriptors of each."""

    centres: Tensor
    """[B, D]."""
    coefficients: Tensor
    """[B, D + 3]: (-2c, -2r, |c|² - r², 1)."""
    largest: float
    """Norm that no descriptor exceeds."""
    slack: float
    euclidean: bool

    @classmethod
    def around(cls, members: Tensor, norms: Tensor, *, slack: float, euclidean: bool) -> BlockBounds:
        """Balls around descriptors [B, 64, D] of norms [B, 64]."""
        centres = members.mean(dim=1)
        radius = torch.linalg.vector_norm(members - centres[:, None], dim=2).amax(dim=1)
        radius = radius * (1 + 1e-5) + 1e-6 * norms.amax(dim=1)
        square, radius_square = centres.square().sum(dim=1), radius.square()
        constant = square - radius_square - 3 * slack * (square + radius_square)
        ends = torch.stack([-2 * radius, constant, torch.ones_like(radius)], dim=1)
        return cls(
            centres=centres,
            coefficients=torch.cat([-2 * centres, ends], dim=1),
            largest=float(norms.max()),
            slack=slack,
            euclidean=euclidean,
        )

    def of_queries(self, queries: Tensor, norms: Tensor, lower: Tensor) -> Tensor:
        """[D + 3, Q]: (q, t, 1, |q|² - t²) of queries [Q, D] that have a score of at least `lower` [Q].

        The product with `coefficients` is |q - c|² - (t + r)², less the most that rounding can add to it.
        """
        square = norms.square()
        reach = square - 2 * lower
        if not self.euclidean:
            reach = reach + self.largest**2
        reach = (reach + self.slack * (square + lower.abs() + self.largest**2 * (not self.euclidean))).clamp(min=0)
        constant = square - reach - 3 * self.slack * (square + reach)
        return torch.cat([queries.T, torch.stack([reach.sqrt(), torch.ones_like(square), constant])])

    def left(self, blocks: slice, of_queries: Tensor) -> Tensor:
        """[b, Q] whether a block may hold the nearest descriptor of a query."""
        return torch.le(self.coefficients[blocks] @ of_queries, 0)


@dataclass(frozen=True, kw_only=True)
class DescriptorMap:
    """A map of descriptors, prepared for many searches."""

    size: tuple[int, int]
    """Height and width."""
    features: Tensor
    """[N, D] float32, row by row."""
    euclidean: bool
    """Compared by distance; otherwise by product, which is fast for descriptors of about equal length."""
    members: Tensor
    """[B, 64, E] descriptors d of each block, so extended that their float32 product with an extended query is no less
    than the score: by slack · |d|, and by (slack - 1/2) · |d|² where distances are compared."""
    pixels: Tensor
    """[B, 64] row · W + column. Blocks over the edge repeat it."""
    largest: Tensor
    """[B] largest norm in each block."""
    bounds: BlockBounds | None
    """None: blocks are not ruled out."""
    slack: float
    """Error of a float32 product at most, in products of the norms."""

    @classmethod
    def build(cls, descriptors: Tensor, *, euclidean: bool = False, bounded: bool | None = None) -> DescriptorMap:
        """Cut a map into blocks.

        Args:
            descriptors: [H, W, D] of any floating type; held in float32 on their device, or in main memory where the
                device is neither a CPU nor CUDA.
            euclidean: compare by distance, as 3D points are, rather than by product.
            bounded: rule out blocks by their bounds. By default on CPUs only: a GPU multiplies everything in less time
                than it takes to list what is left.

        Raises:
            ShapeError: not a map of at least one pixel, or values that are not finite.
        """
        if descriptors.ndim != 3 or 0 in descriptors.shape:
            raise ShapeError(f"descriptors have shape {tuple(descriptors.shape)}, expected [H, W, D] with none zero")
        with torch.inference_mode():
            if descriptors.device.type not in ELEMENTS_AT_ONCE:
                descriptors = descriptors.cpu()
            height, width, channels = descriptors.shape
            features = descriptors.detach().float().reshape(-1, channels)
            pixels = _pixels(height, width).to(features.device)
            members = features[pixels]
            norms = _norms(members)
            if not bool(norms.square().max().isfinite()):
                raise ShapeError("descriptors hold NaN, infinite or enormous values")
            slack = _slack(features.device, channels)
            bounded = features.device.type == "cpu" if bounded is None else bounded
            bounds = BlockBounds.around(members, norms, slack=slack, euclidean=euclidean) if bounded else None
            columns = [slack * norms]
            if euclidean:
                square = torch.linalg.vector_norm(members, dim=2).square()
                columns.append(slack * norms.square() - square / 2)
            members = torch.cat([members, torch.stack(columns, dim=2)], dim=2)
        return cls(
            size=(height, width),
            features=features,
            euclidean=euclidean,
            members=members,
            pixels=pixels,
            largest=norms.amax(dim=1),
            bounds=bounds,
            slack=slack,
        )

    def nearest(self, queries: Tensor, guess: Tensor | None = None) -> Tensor:
        """The nearest pixel to each query; of equally near ones the first.

        Args:
            queries: [Q, D] on the device of `features`.
            guess: [Q] pixels that are probably near; makes the search faster.

        Returns:
            [Q] int64 pixels, row · W + column.

        Raises:
            ShapeError: the queries have another number of dimensions than the map.
        """
        if queries.ndim != 2 or queries.shape[1] != self.features.shape[1]:
            raise ShapeError(f"queries have shape {tuple(queries.shape)}, expected [Q, {self.features.shape[1]}]")
        if len(queries) == 0:
            return torch.zeros(0, dtype=torch.int64, device=self.features.device)
        # Autocast, where a caller has it on, would round products to 8 bits.
        with torch.inference_mode(), torch.autocast(self.features.device.type, enabled=False):
            return _Search(self, queries.float(), guess).run()


class _Search:
    """One call of `DescriptorMap.nearest`."""

    def __init__(self, target: DescriptorMap, queries: Tensor, guess: Tensor | None) -> None:
        self.map, self.queries = target, queries
        self.norms = _norms(queries)
        columns = [self.norms, torch.ones_like(self.norms)][: 1 + target.euclidean]
        self.extended = torch.cat([queries, torch.stack(columns, dim=1)], dim=1)
        self.found = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
        """Candidate blocks of each query so far."""
        self.lower = self._lower(guess)
        """[Q] score that the nearest pixel reaches."""

    def run(self) -> Tensor:
        """[Q] pixels."""
        limit = max(BLOCK_PX, int(CROWDED_SHARE * len(self.map.members)))
        query, block, maxima = (torch.cat(column) for column in zip(*self._candidates(limit), strict=True))
        keep = (self.found[query] <= limit) & (maxima >= self.lower[query])
        index = self._decide(query[keep], block[keep])
        crowded = (self.found > limit).nonzero()[:, 0]
        if len(crowded):
            # So many equal scores come from equal descriptors, often on both sides.
            unlike, place = torch.unique(self.queries[crowded], dim=0, return_inverse=True)
            index[crowded] = nearest_exhaustive(unlike, self.map.features, euclidean=self.map.euclidean)[place]
        return index

    def _excess(self, norms: Tensor, block: Tensor | slice) -> Tensor:
        """By how much the product of a query of some norm with a descriptor of a block exceeds the score, at most."""
        largest = self.map.largest[block]
        return 2 * self.map.slack * (norms * largest + largest.square() * self.map.euclidean)

    def _lower(self, guess: Tensor | None) -> Tensor:
        if guess is not None:
            exact = score_pairs(self.queries, self.map.features[guess], euclidean=self.map.euclidean).float()
            return exact - exact.abs() * 2**-22
        if self.map.bounds is None:
            return torch.full_like(self.norms, -torch.inf)
        # The block whose centre is nearest holds a good neighbour nearly always.
        centres = self.map.bounds.centres
        offset = centres.square().sum(dim=1) / 2 if self.map.euclidean else 0
        rows = max(1, ELEMENTS_AT_ONCE["cpu"] // len(centres))
        block = torch.cat([(some @ centres.T - offset).argmax(dim=1) for some in torch.split(self.queries, rows)])
        block, query = block.sort()
        maxima = self._pair_maxima(block, query)
        lower = torch.empty_like(maxima)
        lower[query] = maxima - self._excess(self.norms[query], block)
        return lower

    def _candidates(self, limit: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Query, block and largest product of pairs that may hold the nearest pixel, some blocks at a time."""
        bounds = self.map.bounds
        columns = 1 if bounds else BLOCK_PX**2
        step = max(1, ELEMENTS_AT_ONCE[self.queries.device.type] // (len(self.queries) * columns))
        of_queries = bounds.of_queries(self.queries, self.norms, self.lower) if bounds else None
        for start in range(0, len(self.map.members), step):
            blocks = slice(start, min(start + step, len(self.map.members)))
            if bounds is None or of_queries is None:
                pairs = self._compare_all(blocks, limit)
            else:
                left = bounds.left(blocks, of_queries) & (self.found <= limit)
                if int(left.count_nonzero()) > DENSE_SHARE * left.numel():
                    pairs = self._compare_all(blocks, limit)
                else:
                    block, query = left.nonzero().unbind(1)
                    pairs = self._compare(block + start, query)
            self.found.index_add_(0, pairs[0], torch.ones_like(pairs[0]))
            yield pairs

    def _compare(self, block: Tensor, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Candidates among pairs, which are sorted by block."""
        maxima = self._pair_maxima(block, query)
        self.lower.scatter_reduce_(0, query, maxima - self._excess(self.norms[query], block), "amax")
        keep = (maxima >= self.lower[query]).nonzero()[:, 0]
        return query[keep], block[keep], maxima[keep]

    def _compare_all(self, blocks: slice, limit: int) -> tuple[Tensor, Tensor, Tensor]:
        """Candidates among all pairs of queries with some blocks."""
        members = self.map.members[blocks]
        columns = members.flatten(0, 1).T
        rows = max(1, 2 * ELEMENTS_AT_ONCE[self.queries.device.type] // columns.shape[1])
        products = (some @ columns for some in torch.split(self.extended, rows))
        maxima = torch.cat([some.view(len(some), len(members), -1).amax(dim=2) for some in products])
        self.lower = torch.maximum(self.lower, (maxima - self._excess(self.norms[:, None], blocks)).amax(dim=1))
        near = (maxima >= self.lower[:, None]) & (self.found <= limit)[:, None]
        query, block = near.nonzero().unbind(1)
        return query, block + blocks.start, maxima[query, block]

    def _pair_maxima(self, block: Tensor, query: Tensor) -> Tensor:
        """[P] largest product of a query with a block, of pairs that are sorted by block.

        The queries of one block are multiplied with it in groups of one size; what is missing in the last group of a
        block is filled up.
        """
        if len(block) == 0:
            return self.norms[:0]
        blocks, count = torch.unique_consecutive(block, return_counts=True)
        size = 1 << ceil(log2(min(64, max(4, len(block) / len(blocks)))))
        groups = (count + size - 1) // size
        skipped = (groups.cumsum(0) - groups) * size - (count.cumsum(0) - count)
        place = torch.arange(len(block), device=block.device) + skipped.repeat_interleave(count)
        of_group = blocks.repeat_interleave(groups)
        rows = query.new_zeros(len(of_group) * size)
        rows[place] = query
        step = max(1, 2 * ELEMENTS_AT_ONCE[block.device.type] // (size * BLOCK_PX**2))
        maxima = [
            torch.bmm(self.extended[some], self.map.members[these].transpose(1, 2)).amax(dim=2)
            for some, these in zip(torch.split(rows.view(-1, size), step), torch.split(of_group, step), strict=True)
        ]
        return torch.cat(maxima).view(-1)[place]

    def _decide(self, query: Tensor, block: Tensor) -> Tensor:
        """[Q] the pixel of the largest exact score among candidates."""
        best = torch.full((len(self.queries),), -torch.inf, dtype=torch.float64, device=query.device)
        index = torch.zeros_like(self.found)
        last = len(self.map.features)
        for q, b in zip(*(torch.split(column, CANDIDATES_AT_ONCE) for column in (query, block)), strict=True):
            products = torch.bmm(self.map.members[b], self.extended[q][:, :, None])[:, :, 0]
            row, place = (products >= self.lower[q][:, None]).nonzero().unbind(1)
            asked, pixel = q[row], self.map.pixels[b[row], place]
            exact = score_pairs(self.queries[asked], self.map.features[pixel], euclidean=self.map.euclidean)
            before = best.clone()
            best.scatter_reduce_(0, asked, exact, "amax")
            index = torch.where(best > before, last, index)
            wins = exact == best[asked]
            index.scatter_reduce_(0, asked[wins], pixel[wins], "amin")
        return index


def _pixels(height: int, width: int) -> Tensor:
    """[B, 64] pixels of each block; those over the edge repeat it."""
    down, right = ceil(height / BLOCK_PX), ceil(width / BLOCK_PX)
    rows, columns = torch.arange(down * BLOCK_PX).clamp(max=height - 1), torch.arange(right * BLOCK_PX)
    grid = rows[:, None] * width + columns.clamp(max=width - 1)
    return grid.view(down, BLOCK_PX, right, BLOCK_PX).transpose(1, 2).reshape(down * right, BLOCK_PX**2)


def _norms(vectors: Tensor) -> Tensor:
    """[...] of vectors [..., D], no less than the true ones but for rounding."""
    norms: Tensor = torch.linalg.vector_norm(vectors, dim=-1)
    return norms + LEAST_NORM


def _slack(device: torch.device, channels: int) -> float:
    """How much a float32 product of two vectors can be off, relative to the product of their norms, twice over."""
    return (channels + 9) * 2.0**-23 + _input_rounding(device)


def _input_rounding(device: torch.device) -> float:
    """What is lost where factors are rounded to fewer bits before they are multiplied."""
    if device.type != "cpu":
        # TF32 has 10 bits. Whether it is on is a setting of the process that other threads change.
        return 2.0**-8
    try:
        precise = torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set in two ways that torch does not reconcile
        precise = False
    return 0.0 if precise else 2.0**-6
