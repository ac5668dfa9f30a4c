"""Counter-based randomness: the published numbers, its distribution, and what it depends on."""

import math

import pytest
import torch
from scipy import stats

from vkvtrain.noise import NoiseSource, canonical_stream, philox, stream_key


def source(streams, events, layer=0, seed=0):
    keys = torch.tensor([stream_key(seed, stream) for stream in streams])
    return NoiseSource((keys[:, 0], keys[:, 1]), torch.tensor(events), layer)


def gumbel(streams=(0,), events=(0,), layer=0, seed=0, heads=1, positions=range(4000)):
    positions = torch.tensor(list(positions)).expand(len(streams), heads, -1)
    return source(streams, events, layer, seed).gumbel(positions)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter, key, expected):
    """The vectors that Random123 publishes for Philox4x32-10."""
    words = philox(counter, (torch.tensor(key[0]), torch.tensor(key[1])))
    assert tuple(word.item() for word in words) == expected


def test_gumbel_noise_is_uniform_underneath():
    noise = gumbel(streams=(0, 1, (5, 2)), events=(0, 3, 1), heads=4)
    assert noise.dtype == torch.float64
    assert noise.isfinite().all()
    uniform = torch.exp(-torch.exp(-noise))
    for sample in uniform.flatten(0, 1):
        assert stats.kstest(sample.numpy(), "uniform").pvalue > 1e-3
    assert stats.kstest(noise.flatten().numpy(), "gumbel_r").pvalue > 1e-3


def test_noise_is_independent_across_everything_that_names_it():
    heads = gumbel(heads=3)[0]
    columns = [
        *heads,
        gumbel(layer=1)[0, 0],
        gumbel(events=(1,))[0, 0],
        gumbel(streams=(1,))[0, 0],
        gumbel(streams=((0, 1),))[0, 0],
        gumbel(streams=((0, 0, 1),))[0, 0],
        gumbel(seed=1)[0, 0],
        gumbel(positions=range(1, 4001))[0, 0],
        gumbel(positions=range(2**31, 2**31 + 4000))[0, 0],
    ]
    correlation = torch.corrcoef(torch.stack(columns))
    correlation.fill_diagonal_(0)
    assert correlation.abs().max() < 4.5 / math.sqrt(4000)  # the shifted column is another draw only by position
    for column in columns:  # neighbours in position
        assert abs(torch.corrcoef(torch.stack([column[:-1], column[1:]]))[0, 1]) < 4.5 / math.sqrt(4000)


def test_noise_is_a_function_of_its_names_alone():
    """Equal for a row in any batch, for any subset of positions and in any order of them."""
    together = gumbel(streams=(4, 9, (9, 1)), events=(2, 0, 7), heads=2, positions=range(50))
    for row, (stream, event) in enumerate([(4, 2), (9, 0), ((9, 1), 7)]):
        alone = gumbel(streams=(stream,), events=(event,), heads=2, positions=range(50))
        assert torch.equal(together[row], alone[0])
        some = [31, 7, 8, 40]
        assert torch.equal(gumbel((stream,), (event,), heads=2, positions=some)[0], alone[0][:, some])
    shifted = gumbel(streams=(4,), events=(2,), heads=2, positions=range(1, 51))
    assert torch.equal(shifted[0, :, :-1], together[0, :, 1:])


def test_a_layer_for_each_sequence():
    """The same numbers, bit for bit, as layer by layer."""
    together = source((4, 9, 4), (2, 0, 2), torch.tensor([3, 0, 7]))
    positions = torch.arange(50).expand(3, 2, -1)
    for row, (stream, event, layer) in enumerate([(4, 2, 3), (9, 0, 0), (4, 2, 7)]):
        alone = source((stream,), (event,), layer)
        assert torch.equal(together.gumbel(positions)[row], alone.gumbel(positions[:1])[0])
        for per_event in (False, True):
            assert torch.equal(together.projection(8, 5, per_event)[row], alone.projection(8, 5, per_event)[0])


def test_streams():
    assert canonical_stream(3) == canonical_stream((3, 0)) == canonical_stream(((3,), 0)) == (3,)
    assert canonical_stream(((7, 0, 2), 1)) == (7, 0, 2, 1)
    assert canonical_stream(0) == canonical_stream((0, 0, 0)) == ()
    names = [(0, 0, 1), (0, 1), (1, 0), (1, 1), -1, 2**40, (2**40, 1), (1, 2), (2, 1), (0,)]
    assert len({stream_key(0, name) for name in names}) == len(names)
    assert stream_key(0, 5) != stream_key(5, 0)
    for wrong in ("a", 1.5, None, True, (1, "b")):
        with pytest.raises(ValueError, match="ints or tuples of ints"):
            canonical_stream(wrong)
    with pytest.raises(ValueError, match="64 bits"):
        canonical_stream(2**64)


def test_projections():
    """N(0, 1/rank) entries, one matrix for all heads, drawn afresh per event or once per sequence."""
    draws = source((0, 0, 1), (0, 1, 0)).projection(64, 20, per_event=True)
    assert draws.shape == (3, 64, 20)
    assert draws.dtype == torch.float32
    for one in draws:
        assert stats.kstest(one.flatten().numpy() * math.sqrt(20), "norm").pvalue > 1e-3
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    fixed = source((0, 0, 1), (0, 1, 0)).projection(64, 20, per_event=False)
    assert torch.equal(fixed[0], fixed[1])
    assert not torch.equal(fixed[0], fixed[2])
    assert not torch.equal(fixed[0], source((0,), (0,), layer=1).projection(64, 20, per_event=False)[0])
