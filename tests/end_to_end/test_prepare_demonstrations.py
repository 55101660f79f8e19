"""The command line of launch/prepare_demonstrations.py: a store, messages, what it refuses."""

from __future__ import annotations

import pytest

from launch.prepare_demonstrations import main
from pipeline.data.store import TokenStore
from tests.labelled_files import write_set
from tests.squad_files import ship, write_squad
from tests.tiny_tokenizer import save_tiny_tokenizer


@pytest.fixture
def words(tmp_path):
    """Everything but the output."""
    save_tiny_tokenizer(tmp_path / "tokenizer")
    sentences = [(f"{'good' if number % 2 else 'bad'} {number}", number % 2) for number in range(40)]
    for name in ("MR", "Subj"):
        write_set(tmp_path / "icl", name, sentences[:36], sentences[36:])
    squad = write_squad(
        tmp_path / "squad.json", Old=[ship(number) for number in range(6)], New=[ship(number) for number in (6, 7)]
    )
    return [
        *("--in-context", str(tmp_path / "icl"), "--sets", "mr", "Subj"),
        *("--squad", squad, "--squad-articles", "Old"),
        *("--documents", "4", "--validation-documents", "2", "--validation-share", "0.3", "--document-tokens", "150"),
        *("--tokenizer", str(tmp_path / "tokenizer")),
    ]


def test_a_store_is_made_and_a_table_printed(words, tmp_path, capsys):
    output = tmp_path / "out" / "store"
    assert main([*words, "--output", str(output)]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["train", "12"]
    train, held_out = TokenStore.open(output), TokenStore.open(output, "validation")
    assert held_out.num_documents == 6 and max(train.lengths) <= 150
    assert [train.source(number) for number in (0, 1, 2)] == ["MR; train 0", "Subj; train 0", "SQuAD; train 0"]
    assert train.source(3) == "MR, labels permuted: positive, negative; train 1"
    again = tmp_path / "again"
    assert main([*words, "--output", str(again)]) == 0
    assert TokenStore.open(again).identity == train.identity
    assert main([*words, "--output", str(again), "--overwrite", "--seed", "5", "--validation-documents", "0"]) == 0
    assert TokenStore.open(again).identity != train.identity and not (again / "validation").exists()


def test_relabelling_can_be_chosen(words, tmp_path):
    options = ["--relabel", "1", "--relabel-with", "permuted", "--passages-first", "0", "--unanswerable", "left_out"]
    assert main([*words, *options, "--output", str(tmp_path / "store")]) == 0
    store = TokenStore.open(tmp_path / "store")
    sources = {store.source(number).partition(";")[0] for number in range(store.num_documents)}
    assert sources == {
        "MR, labels permuted: positive, negative",
        "Subj, labels permuted: objective, subjective",
        "SQuAD",
    }


def test_errors_exit_with_one_and_leave_nothing(words, tmp_path, capsys):
    output = tmp_path / "out" / "store"
    assert main([*words, "--document-tokens", "9", "--output", str(output)]) == 1
    error = capsys.readouterr().err
    assert "error: a document of MR would have too few demonstrations; got: 0 of the" in error
    assert "Traceback" not in error and not output.parent.exists()
    assert main([*words, "--sets", "SST-2", "--output", str(output)]) == 1
    assert "error: the set SST-2 is not in the data" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give --in-context, --squad or both"),
        (["--squad", "x"], "--squad goes with --squad-tested, --squad-articles or both"),
        (["--in-context", "x", "--squad-articles", "x"], "--squad goes with"),
        (["--in-context", "x", "--sets", "SST"], "there is no set 'SST'; expected some of SST-2"),
        (["--in-context", "x", "--relabel", "2"], "2 is not from 0 to 1"),
        (["--in-context", "x", "--relabel", "half"], "'half' is not a number"),
        (["--in-context", "x", "--documents", "0"], "0 is not from 1 to 1,000,000"),
        (["--in-context", "x", "--validation-share", "0"], "--validation-share must be between 0 and 1"),
    ],
)
def test_options_that_do_not_go_together(options, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([*options, "--tokenizer", "x", "--output", "x"])
    assert message in capsys.readouterr().err
