"""The benchmark compares the same work: both sides find the same loss and the same probability."""

import bench
import pytest


@pytest.fixture(scope="module")
def args(tmp_path_factory):
    words = ["--shape", "test", "--examples", "4", "--batch-size", "2", "--epochs", "1"]
    args = bench.parse_args(words)
    args.checkpoint = str(tmp_path_factory.mktemp("bench"))
    args.layer = 0
    bench.make_checkpoint(args)
    return args


@pytest.mark.parametrize("work", bench.WORK)
def test_both_sides_find_the_same(args, work):
    questions = bench.make_questions(args, work)
    found = {}
    for name, side in bench.SIDES.items():
        found[name] = bench.measured(args, work, side(args, work), questions)["agreed"]
    assert found["ours"] == pytest.approx(found["theirs"], rel=1e-4)
