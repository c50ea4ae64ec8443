"""Totals of In-Run Data Shapley values, and what one does with them, on a run small enough to add up by hand."""

import math

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset
from huggingface_hub import DatasetCard

from hf_iclr.trainers.data_shapley.identity import content_id
from hf_iclr.trainers.data_shapley.result import DataShapleyResult
from hf_iclr.trainers.data_shapley.trained_rows import TrainedRows


SOURCES = ["a", "b", "a", "b", "a"]
TRAIN = Dataset.from_dict({"input_ids": [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10], [11]], "source": SOURCES})


@pytest.fixture
def result() -> DataShapleyResult:
    """
    Four steps of two rows; row 4 is never seen. Values for "validation":

        step     1          2          3          4         sum   seen  tokens
        row 0   +3.0       +0.5                  -0.5      +3.0    3     9
        row 1   -1.0                  +0.2                 -0.8    2     2
        row 2              +1.5                  +0.5      +2.0    2     4
        row 3                         -0.6                 -0.6    1     4

    Loss 5.0 before step 1 and 2.0 before step 3: a fall of 3 for a sum of +2 +2 = 4. For "safety" all is doubled and
    negative, and no loss was measured.
    """
    parts, lengths = [], [len(ids) for ids in TRAIN["input_ids"]]
    steps = [((0, 1), (3.0, -1.0)), ((0, 2), (0.5, 1.5)), ((1, 3), (0.2, -0.6)), ((0, 2), (-0.5, 0.5))]
    for step, (rows, values) in enumerate(steps, 1):
        tokens = [lengths[row] for row in rows]
        of_tokens = [np.full(count, value / count) for count, value in zip(tokens, values, strict=True)]
        parts.append(
            pd.DataFrame(
                {
                    "step": step,
                    "index": rows,
                    "tokens": tokens,
                    "value": values,
                    "token_values": of_tokens,
                    "value_safety": [-2 * value for value in values],
                    "token_values_safety": [-2 * of_row for of_row in of_tokens],
                }
            )
        )
    steps = pd.DataFrame({"step": [1, 2, 3, 4], "lr": 0.1, "loss_validation": [5.0, None, 2.0, None]})
    return DataShapleyResult(pd.concat(parts, ignore_index=True), steps)


def by_id(result: DataShapleyResult, ids: list[str], id_column: str | None = None) -> DataShapleyResult:
    rows = result.rows.assign(id=result.rows["index"].map(dict(enumerate(ids)))).drop(columns="index")
    trained = TrainedRows(id_column, None if id_column else ["input_ids"])
    return DataShapleyResult(rows, result.steps, trained=trained)


def test_values_are_sums_over_steps(result):
    assert result.targets == ["validation", "safety"]
    assert result.values().to_dict() == pytest.approx({0: 3.0, 1: -0.8, 2: 2.0, 3: -0.6})
    assert result.values("safety").to_dict() == pytest.approx({0: -6.0, 1: 1.6, 2: -4.0, 3: 1.2})


def test_values_by_exposure_token_and_step(result):
    assert result.values(normalize="exposure").to_dict() == pytest.approx({0: 1.0, 1: -0.4, 2: 1.0, 3: -0.6})
    assert result.values(normalize="token").to_dict() == pytest.approx({0: 3 / 9, 1: -0.8 / 2, 2: 0.5, 3: -0.15})
    shares = {0: 3 / 4 + 0.5 / 2 - 0.5, 1: -1 / 4 + 0.2 / 0.8, 2: 1.5 / 2 + 0.5, 3: -0.6 / 0.8}
    assert result.values(normalize="step").to_dict() == pytest.approx(shares)
    with pytest.raises(ValueError, match="'exposure', 'token' or 'step', got 'rows'"):
        result.values(normalize="rows")


def test_top_and_bottom_rows(result):
    top, bottom = result.top(2), result.bottom(2)
    assert top.index.tolist() == [0, 2] and top["value"].tolist() == pytest.approx([3.0, 2.0])
    assert top["exposures"].tolist() == [3, 2] and top["tokens"].tolist() == [9, 4]
    assert bottom.index.tolist() == [1, 3]
    assert result.bottom(2, "safety").index.tolist() == [0, 2]
    assert result.top(1, normalize="token").index.tolist() == [2]
    assert result.bottom(1, normalize="exposure").index.tolist() == [3]


def test_a_row_without_tokens_has_no_value_per_token(result):
    rows = result.rows.assign(tokens=0, value=0.0)
    assert DataShapleyResult(rows, result.steps).table().drop(columns="exposures").to_numpy().tolist() == [[0] * 5] * 4


def test_explained_ratio_and_summary(result):
    table = result.explained()
    assert table.to_dict("records") == [
        {"first_step": 1, "last_step": 2, "value": 4.0, "loss_drop": 3.0, "ratio": pytest.approx(4 / 3)}
    ]
    assert result.explained_ratio() == pytest.approx(4 / 3)
    assert math.isnan(result.explained_ratio("safety"))
    summary = result.summary()
    assert summary.loc["validation", ["rows", "value", "harmful", "loss_first", "loss_last"]].tolist() == [
        4, pytest.approx(3.6), 0.5, 5.0, 2.0,
    ]  # fmt: skip
    assert summary.loc["safety", "value"] == pytest.approx(-7.2)
    assert math.isnan(summary.loc["safety", "agreement"])
    summary = DataShapleyResult(result.rows, result.steps.assign(agreement_safety=[None, 0.5, 0.1, None])).summary()
    assert summary.loc["safety", "agreement"] == pytest.approx(0.3)


def test_explained_ratio_step_by_step(result):
    steps = result.steps.assign(loss_validation=[5.0, 3.5, 1.5, 2.0])
    table = DataShapleyResult(result.rows, steps).explained()
    assert table["value"].tolist() == pytest.approx([2.0, 2.0, -0.4])
    assert table["loss_drop"].tolist() == pytest.approx([1.5, 2.0, -0.5])
    assert table["last_step"].tolist() == [1, 2, 3]


def test_columns_of_the_dataset(result):
    dataset = result.to_dataset(TRAIN)
    assert dataset["shapley_value"][:] == pytest.approx([3.0, -0.8, 2.0, -0.6, None])
    assert dataset["shapley_value_safety"][:] == pytest.approx([-6.0, 1.6, -4.0, 1.2, None])
    assert dataset["shapley_exposures"][:] == [3, 2, 2, 1, None]
    assert dataset["source"][:] == SOURCES and "shapley_value" not in TRAIN.column_names


def test_filter_keeps_the_helpful_rows_in_their_order(result):
    def kept(**options) -> list[int]:
        return [ids[0] for ids in result.filter(TRAIN, **options)["input_ids"]]

    assert kept() == [1, 5, 11]  # rows 0 and 2, and 4 which was never seen
    assert kept(keep_unseen=False) == [1, 5]
    assert kept(keep=0.75, keep_unseen=False) == [1, 5, 7]
    assert kept(keep=0.25, normalize="token", keep_unseen=False) == [5]
    assert kept(target="safety", keep_unseen=False) == [4, 7]
    assert kept(keep=0.5, within="source", keep_unseen=False) == [1, 7]  # the better one of each source
    assert kept(keep=1) == [1, 4, 5, 7, 11]
    for keep in ("negative", 0, 1.5):
        with pytest.raises(ValueError, match=f"Expected keep='positive' or a share in .* got {keep!r}"):
            result.filter(TRAIN, keep=keep)


def test_rows_without_a_source_are_a_source_of_their_own(result):
    rows = TRAIN.remove_columns("source").add_column("source", ["a", None, "a", None, "a"])
    kept = result.filter(rows, within="source", keep_unseen=False)  # rows 1 and 3 are harmful
    assert [ids[0] for ids in kept["input_ids"]] == [1, 5]


def test_rows_with_a_value_that_are_missing_are_counted(result, caplog):
    hashes = by_id(result, [content_id({"input_ids": ids}) for ids in TRAIN["input_ids"]])
    hashes.to_dataset(TRAIN)
    assert "not among these" not in caplog.text
    hashes.to_dataset(TRAIN.select([0]))
    assert caplog.text.count("3 of 4 rows with a value are not among these.") == 1


def test_rows_known_by_content_or_id_are_found_in_any_order(result):
    shuffled = TRAIN.select([3, 0, 4, 2, 1])
    hashes = by_id(result, [content_id({"input_ids": ids}) for ids in TRAIN["input_ids"]])
    assert hashes.to_dataset(shuffled)["shapley_value"][:] == pytest.approx([-0.6, 3.0, None, 2.0, -0.8])
    assert hashes.by_source("source").totals["value"].to_dict() == pytest.approx({"a": 5.0, "b": -1.4})
    named = by_id(result, ["0", "1", "2", "3", "4"], "uid")
    with_ids = shuffled.add_column("uid", [3, 0, 4, 2, 1])
    assert named.filter(with_ids, keep_unseen=False)["uid"][:] == [0, 2]
    with pytest.raises(ValueError, match="rows with uid.*got .'input_ids', 'source'"):
        named.to_dataset(shuffled)
    with pytest.raises(ValueError, match="none of these has a value"):
        hashes.to_dataset(Dataset.from_dict({"input_ids": [[99]]}))


def test_a_stream_of_rows_is_found_by_content(result):
    hashes = by_id(result, [content_id({"input_ids": ids}) for ids in TRAIN["input_ids"]])
    stream = TRAIN.to_iterable_dataset()
    assert [row["shapley_value"] for row in hashes.to_dataset(stream)] == pytest.approx([3.0, -0.8, 2.0, -0.6, None])
    assert [row["input_ids"][0] for row in hashes.filter(stream)] == [1, 5, 11]
    assert [row["input_ids"][0] for row in hashes.filter(stream, keep_unseen=False)] == [1, 5]


def test_other_datasets_are_refused(result):
    with pytest.raises(ValueError, match="the 4 rows that were trained on.*got 2 rows.*Give trainer.train_dataset"):
        result.to_dataset(TRAIN.select(range(2)))
    with pytest.raises(TypeError, match="Expected a datasets.Dataset, got list"):
        result.filter([{"input_ids": [1]}])
    with pytest.raises(ValueError, match="target among .'validation', 'safety'., got 'maths'"):
        result.top(target="maths")


def test_values_by_source(result, tmp_path):
    with pytest.raises(ValueError, match=r"column 'source', got NoneType.*by_source\('source', train_dataset\)"):
        result.by_source("source")
    result.to_dataset(TRAIN)
    sources = result.by_source("source")
    assert sources.totals["value"].to_dict() == pytest.approx({"a": 5.0, "b": -1.4})
    assert sources.totals.loc["a", ["rows", "exposures", "tokens"]].tolist() == [2, 5, 13]
    assert sources.totals["harmful"].to_dict() == pytest.approx({"a": 1 / 5, "b": 2 / 3})
    assert sources.timeline["a"].fillna(0).tolist() == pytest.approx([3.0, 2.0, 0.0, 0.0])
    assert sources.timeline["b"].fillna(0).tolist() == pytest.approx([-1.0, 0.0, -0.4, 0.0])
    pd.testing.assert_frame_equal(result.by_source(SOURCES).totals, sources.totals)
    assert result.by_source("source", target="safety").totals["value"]["a"] == pytest.approx(-10.0)
    figure = sources.plot(tmp_path / "sources.png")
    lines = {line.get_label(): list(line.get_ydata()) for line in figure.axes[1].lines}
    assert lines["a"] == pytest.approx([3.0, 2.0, 0.0, 0.0])
    assert (tmp_path / "sources.png").stat().st_size > 1000
    coarse = sources.plot(bins=2).axes[1].lines[0]
    assert list(coarse.get_ydata()) == pytest.approx([2.5, 0.0]) and list(coarse.get_xdata()) == [1.5, 3.5]
    with pytest.raises(ValueError, match="each of the 4 trained rows, got 2 labels"):
        result.by_source(["a", "b"])


def test_token_page_shows_each_token_with_its_value(result, tmp_path, word_tokenizer):
    page = result.token_heatmap([0, 3], word_tokenizer, TRAIN, path=tmp_path / "tokens.html")
    assert (tmp_path / "tokens.html").read_text() == page
    # Row 0 is worth 3, so each of its three tokens 1, as strong as any; row 3 has four of -0.15.
    assert "Row 0: +3 nats" in page and page.count('title="+1"') == 3 and page.count('title="-0.15"') == 4
    assert ">w1<" in page and ">w10<" in page and page.count("0.750") == 7
    with pytest.raises(ValueError, match="give train_dataset"):
        result.token_heatmap(0, word_tokenizer)
    with pytest.raises(ValueError, match="rows of token_values_for that were trained on, got 4"):
        result.token_heatmap(4, word_tokenizer, TRAIN)
    without = DataShapleyResult(result.rows.drop(columns="token_values"), result.steps, TRAIN)
    with pytest.raises(ValueError, match="token_values_for="):
        without.token_heatmap(0, word_tokenizer)


def test_tables_are_exported(result, tmp_path):
    result.to_csv(tmp_path / "values.csv")
    result.to_parquet(tmp_path / "values.parquet")
    for frame in (pd.read_csv(tmp_path / "values.csv"), pd.read_parquet(tmp_path / "values.parquet")):
        assert frame["target"].tolist() == ["validation"] * 4 + ["safety"] * 4
        assert frame["index"].tolist() == [0, 1, 2, 3] * 2
        assert frame["value"].tolist()[:4] == pytest.approx([3.0, -0.8, 2.0, -0.6])


def test_saved_and_loaded_it_is_the_same(result, tmp_path):
    for saved, folder in ((result, "index"), (by_id(result, ["a", "b", "c", "d"], "uid"), "id")):
        saved.save_pretrained(tmp_path / folder)
        loaded = DataShapleyResult.from_pretrained(tmp_path / folder)
        pd.testing.assert_frame_equal(loaded.table("safety"), saved.table("safety"))
        pd.testing.assert_frame_equal(loaded.summary(), saved.summary())
        assert loaded.trained.facts() == saved.trained.facts() and loaded.key == folder


def test_pushed_to_the_hub_it_is_a_dataset_with_a_card(hub, result, tmp_path):
    result.save_pretrained(tmp_path / "saved")
    printed = hub.run(f"""
        from datasets import load_dataset
        from hf_iclr.trainers.data_shapley.result import DataShapleyResult

        saved = DataShapleyResult.from_pretrained({str(tmp_path / "saved")!r})
        url = saved.push_to_hub("tester/values", private=True).repo_url
        loaded = DataShapleyResult.from_pretrained("tester/values")
        loaded.to_csv({str(tmp_path / "loaded.csv")!r})
        print(url, load_dataset("tester/values", split="train")["value"][:4])
    """)
    assert "tester/values [3.0, " in printed
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "loaded.csv"), result.to_frame(), check_dtype=False)
    assert hub.repo("datasets", "tester/values").private

    (tmp_path / "README.md").write_bytes(hub.files("tester/values", "datasets")["README.md"])
    card = DatasetCard.load(tmp_path / "README.md")
    assert [part["config_name"] for part in card.data.to_dict()["configs"]] == ["values", "rows", "steps"]
    assert "| validation | 4 | +3.6 | 50 % | 5, 2 | 1.33 |" in card.text
    assert 'from_pretrained("tester/values")' in card.text
