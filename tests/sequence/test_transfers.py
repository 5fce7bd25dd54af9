# SPDX-License-Identifier: Apache-2.0
"""Rows on their way between ranks, against moving each token by hand."""

from hypothesis import given
from hypothesis import strategies as st

from nemo_dsv4_cp.sequence.transfers import transfers


@st.composite
def questions(draw):
    """Draw who has which tokens, and runs of tokens that each rank asks for, some before 0."""
    ranks, local_len = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    total = ranks * local_len
    shards = [(range(r * local_len, (r + 1) * local_len),) for r in range(ranks)]
    owners = draw(st.permutations(range(total))) if draw(st.booleans()) else list(range(total))
    # Tokens that ranks hold for others, in any order; shards, or any.
    sent = [
        tuple(range(t, t + 1) for t in owners[r * local_len : (r + 1) * local_len])
        for r in range(ranks)
    ]
    runs = st.tuples(st.integers(-4, total - 1), st.integers(0, 6)).map(
        lambda drawn: range(drawn[0], min(drawn[0] + drawn[1], total))
    )
    wanted = [tuple(draw(st.lists(runs, max_size=4))) for _ in range(ranks)]
    own = shards if draw(st.booleans()) else [()] * ranks
    return wanted, own, sent


@given(questions())
def test_each_rank_gets_the_tokens_that_it_wants_in_their_order(question):
    wanted, own, sent = question
    ranks = range(len(wanted))
    parts = [transfers(wanted, own, sent, rank=rank) for rank in ranks]
    has = [[token for run in runs for token in run] for runs in own]
    holds = [[token for run in runs for token in run] for runs in sent]
    for rank, part in enumerate(parts):
        arriving = {
            source: [
                token for rows in parts[source].sent.get(rank, ()) for token in holds[source][rows]
            ]
            for source in ranks
        }
        assert {s: len(tokens) for s, tokens in arriving.items() if tokens} == dict(part.arriving)
        answer = []
        for piece in part.pieces:
            if piece.is_own:
                answer += has[rank][piece.rows]
            elif piece.source is None:
                answer += [None] * len(piece)
            else:
                tokens = arriving[piece.source]
                answer += tokens[: len(piece)]
                arriving[piece.source] = tokens[len(piece) :]
        asked = [token for run in wanted[rank] for token in run]
        assert answer == [token if token >= 0 else None for token in asked]
        assert not any(arriving.values())
        assert part.any_moves == any(other.arriving for other in parts)
        assert not any(piece.source is not None for piece in part.pieces if piece.is_own)
        mine = set(has[rank])
        moved = [t for t in asked if t >= 0 and t not in mine]
        assert sum(part.arriving.values()) == len(moved)
