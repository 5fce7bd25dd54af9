from nemo_dsv4_cp.sequence.layout import SequenceLayout
from nemo_dsv4_cp.tools import work


def test_work_counts_what_each_query_sees():
    def seen(layout, ratio, limit):
        return sum(min((i + 1) // ratio, limit) for i in range(layout.start, layout.end))

    for start_rank in range(4):
        layout = SequenceLayout(4096, start_rank, 4)
        assert layout.entries_seen(layout.own, 4) == seen(layout, 4, 1 << 30)
        for ratio, limit in ((1, 128), (4, 512), (4, 3000)):
            counted = work._at_most(layout.end, ratio, limit)
            counted -= work._at_most(layout.start, ratio, limit)
            assert counted == seen(layout, ratio, limit)
