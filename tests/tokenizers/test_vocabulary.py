"""Mixed-radix factors of token indices."""

import pytest
import torch

from hma_gym.errors import InvalidArgument
from hma_gym.nn.vocabulary import join_factors, split_factors, vocabulary_size


@pytest.mark.parametrize("sizes", [(1000,), (40, 25), (8, 5, 5, 5), (512, 512), (2, 1, 3)])
def test_factors_and_back(sizes):
    count = vocabulary_size(sizes)
    tokens = torch.arange(count).reshape(1, 1, count) if count < 5000 else torch.randint(count, (3, 4, 5))
    digits = split_factors(tokens, sizes)
    assert digits.shape == (*tokens.shape, len(sizes)) and digits.dtype == torch.int64
    for position, size in enumerate(sizes):
        assert 0 <= int(digits[..., position].min()) and int(digits[..., position].max()) < size
    assert torch.equal(join_factors(digits, sizes), tokens)


def test_first_factor_changes_fastest():
    assert split_factors(torch.tensor([0, 1, 8, 39, 40]), (8, 5, 25)).tolist() == [
        [0, 0, 0],
        [1, 0, 0],
        [0, 1, 0],
        [7, 4, 0],
        [0, 0, 1],
    ]


def test_bad_sizes_are_named():
    with pytest.raises(InvalidArgument, match="factor sizes"):
        vocabulary_size(())
    with pytest.raises(InvalidArgument, match="factor sizes"):
        split_factors(torch.zeros(2, dtype=torch.int64), (4, 0))
    with pytest.raises(InvalidArgument, match=r"2 factors"):
        join_factors(torch.zeros(2, 3, dtype=torch.int64), (4, 4))
