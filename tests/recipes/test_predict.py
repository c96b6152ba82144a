"""A model that was trained before names the siRNA of a screen."""

import json
import shutil

import keras
import numpy as np
import pandas as pd
import predict
import pytest
from contenders.batch_statistics import predict_by_group, with_batch_statistics
from hparams import EMBEDDED
from job import as_command, images_of
from methods import build_model
from normalization import normalization

from tfrecords import build_records, class_names, list_sites, read_manifest, read_records, write_screen
from tfrecords.manifest import channel_names

pytestmark = [pytest.mark.any_backend, pytest.mark.usefixtures("eager")]


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("predict")
    experiments = {"train": {"HUVEC": 1}, "val": {"RPE": 1}, "test": {"HUVEC": 1, "RPE": 1}}
    write_screen(folder / "screen", image_size=24, treatments=12, experiments=experiments)
    build_records(folder / "screen", folder / "records")
    return folder / "records"


def trained(records, folder, method, normalize="plate"):
    """A job's output folder, but for the training: batch normalizations have statistics of their own."""
    keras.utils.set_random_seed(0)
    names = class_names(records, ("treatment",))
    model = build_model(method, EMBEDDED | {"embedding_dim": 6}, (24, 24, 6), names)
    model.compile("sgd", loss=None if method == "abra" else "sparse_categorical_crossentropy")
    model.fit(read_records(records, "train", batch_size=4, training=True), epochs=1, verbose=0)
    model.save(folder / "model.keras")
    (folder / "metrics.json").write_text(json.dumps({"normalize": normalize, "classes": names}))
    return model


def run(*arguments):
    return predict.main([*map(str, arguments)])


@pytest.mark.parametrize("method", ["abra", "erm"])
def test_it_answers_as_the_model_does_and_by_experiment_with_ada_bn(records, tmp_path, method, capsys):
    model = trained(records, tmp_path, method)
    network = model
    if method == "abra":
        x = model.pooling(model.backbone.output)
        network = keras.Model(model.backbone.input, model.head(model.neck(x)) * model.loss_function.scale)
    sites = list_sites(records, "test")
    data = read_records(records, "test", batch_size=64, normalize=normalization(records, "test", "plate"))
    images = np.concatenate([image for image, _ in data.as_numpy_iterator()])
    label, names = sites["label"].to_numpy("int64"), np.array(class_names(records, ("treatment",)))
    expected = {
        "": network.predict(images, verbose=0),
        "--ada-bn": predict_by_group(with_batch_statistics(network), images, sites["experiment"]),
    }
    assert (expected[""].argmax(1) != expected["--ada-bn"].argmax(1)).any()
    for option, logits in expected.items():
        file, vectors = tmp_path / f"out{option}.csv", tmp_path / f"embeddings{option}.csv"
        options = ["--output", file, "--embeddings", vectors, *([option] if option else [])]
        scores = run(tmp_path / "model.keras", records, *options)
        found = pd.read_csv(file).set_index("site_id").loc[sites["site_id"]]
        assert (found["predicted_1"] == names[logits.argmax(1)]).all() and (found["label"] == names[label]).all()
        embedded = pd.read_csv(vectors).set_index("site_id").loc[sites["site_id"]]
        assert (embedded["well"] == found["well"]).all() and (embedded["sirna"] == found["sirna"]).all()
        embedded = embedded.filter(like="embedding_").to_numpy()
        assert embedded.shape == (len(sites), 6) and np.allclose(np.linalg.norm(embedded, axis=1), 1, atol=1e-5)
        kernel = model.head if method == "abra" else model.layers[-1]
        again = embedded @ np.asarray(kernel.get_weights()[0])
        if method == "abra":  # cosines
            again /= np.linalg.norm(kernel.get_weights()[0], axis=0)
            np.testing.assert_allclose(again * model.loss_function.scale, logits, atol=2e-3)
        else:
            logits = logits - kernel.get_weights()[1]
            shares = np.linalg.norm(again, axis=1) / np.linalg.norm(logits, axis=1)
            np.testing.assert_allclose(again, logits * shares[:, None], atol=2e-3)
            logits = logits + kernel.get_weights()[1]
        assert scores["splits"]["test"]["accuracy"] == pytest.approx((logits.argmax(1) == label).mean())
        assert f"{100 * (logits.argmax(1) == label).mean():.1f}" in capsys.readouterr().out


def test_controls_are_predicted_and_embedded_if_asked_for_and_else_named(records, tmp_path, capsys):
    trained(records, tmp_path, "abra")
    treated, all_sites = list_sites(records, "test"), list_sites(records, "test", ("treatment", "control"))
    without, along, table = tmp_path / "without.csv", tmp_path / "with.csv", tmp_path / "embeddings.csv"
    run(tmp_path / "model.keras", records, "--output", without)
    assert f"Not predicted: {len(all_sites) - len(treated)} sites of control wells" in capsys.readouterr().out
    options = ("--output", along, "--embeddings", table, "--by-well", tmp_path / "wells.csv", "--controls")
    scores = run(tmp_path / "model.keras", records, *options)
    assert "control wells" not in capsys.readouterr().out
    one, both = pd.read_csv(without), pd.read_csv(along)
    assert sorted(both["site_id"]) == sorted(pd.read_csv(table)["site_id"]) == sorted(all_sites["site_id"])
    wells = pd.read_csv(tmp_path / "wells.csv")
    assert sorted(wells["well_id"]) == sorted(all_sites["well_id"].unique()) and wells["sites"].sum() == len(all_sites)
    again = both.set_index("site_id").loc[one["site_id"]].reset_index()
    assert again["predicted_1"].tolist() == one["predicted_1"].tolist()
    assert scores["splits"]["test"]["count"] == len(treated)  # controls are none of the model's classes


def test_what_does_not_fit_is_named(records, tmp_path, monkeypatch):
    trained(records, tmp_path, "erm")
    model, new = tmp_path / "model.keras", tmp_path / "new.csv"
    old = tmp_path / "old.csv"
    old.write_text("kept")
    with pytest.raises(ValueError, match="old.csv is there already"):
        run(model, records, "--output", old)
    with pytest.raises(ValueError, match="none.keras is no file"):
        run(tmp_path / "none.keras", records, "--output", new)
    with pytest.raises(ValueError, match="new.csv: there is no folder .*nowhere"):
        run(model, records, "--output", tmp_path / "nowhere" / "new.csv")
    with pytest.raises(ValueError, match="old.csv is no model that can be loaded"):
        run(old, records, "--output", new)
    build_records(records.parent / "screen", tmp_path / "small", image_size=16)
    with pytest.raises(ValueError, match=r"takes images of \(24, 24, 6\), and the records have \(16, 16, 6\)"):
        run(model, tmp_path / "small", "--output", new)
    for file, message in {"old.csv": "--embeddings .* is there already", "new.npy": "ends in .csv or .parquet"}.items():
        with pytest.raises(ValueError, match=message):
            run(model, records, "--output", new, "--embeddings", tmp_path / file)
    with pytest.raises(ValueError, match="--embeddings and --by-well are one file"):
        run(model, records, "--output", new, "--embeddings", tmp_path / "n.csv", "--by-well", tmp_path / "n.csv")
    monkeypatch.setattr(predict, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="Parquet files need pyarrow"):
        run(model, records, "--output", new, "--embeddings", tmp_path / "new.parquet")
    (tmp_path / "moved").mkdir()
    shutil.copy(model, tmp_path / "moved")
    with pytest.raises(ValueError, match="no .*metrics.json, .* Pass --normalize"):
        run(tmp_path / "moved" / "model.keras", records, "--output", new)
    with pytest.raises(ValueError, match="names of the 12 classes .* are not known"):
        run(tmp_path / "moved" / "model.keras", records, "--normalize", "image", "--output", new)
    for text, message in (
        ("{", "metrics.json is none of a job"),
        ('{"normalize": ["plate"]}', r"metrics.json: unknown normalization \['plate'\]"),
        ('{"classes": ["a", "b"]}', "names of the 12 classes .* found 2"),
    ):
        (tmp_path / "moved" / "metrics.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            run(tmp_path / "moved" / "model.keras", records, "--output", new)
    table = pd.read_csv(records.parent / "screen" / "metadata.csv")
    shutil.copytree(records.parent / "screen", tmp_path / "untested")
    table[table["dataset"] != "test"].to_csv(tmp_path / "untested" / "metadata.csv", index=False)
    build_records(tmp_path / "untested", tmp_path / "no_test")
    with pytest.raises(ValueError, match="The split 'test' is empty"):
        run(model, tmp_path / "no_test", "--output", new)
    one = tmp_path / "one"
    shutil.copytree(records.parent / "screen", one)
    table = pd.read_csv(one / "metadata.csv")
    test = (table["dataset"] == "test") & (table["well_type"] == "treatment")
    table[test].drop_duplicates("experiment").to_csv(one / "metadata.csv", index=False)
    build_records(one, tmp_path / "one_site")
    with pytest.raises(ValueError, match="--ada-bn needs 2 sites or more of an experiment; .* has one"):
        run(model, tmp_path / "one_site", "--normalize", "image", "--ada-bn", "--output", new)
    damaged = bytearray(model.read_bytes())
    damaged[len(damaged) // 2] ^= 255
    model.write_bytes(damaged)
    with pytest.raises(ValueError, match="model.keras is no model that can be loaded"):
        run(model, records, "--output", new)
    assert old.read_text() == "kept" and not new.exists()


def test_other_channels_of_the_same_number_are_pointed_out(records, tmp_path, capsys):
    trained(records, tmp_path, "erm", "image")
    file = tmp_path / "metrics.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"channels": channel_names(read_manifest(records))}))
    run(tmp_path / "model.keras", records, "--output", tmp_path / "same.csv")
    assert "WARNING" not in capsys.readouterr().out
    build_records(records.parent / "screen", tmp_path / "turned", channels=(6, 5, 4, 3, 2, 1))
    run(tmp_path / "model.keras", tmp_path / "turned", "--output", tmp_path / "turned.csv")
    said = capsys.readouterr().out
    assert "WARNING: the model was trained on the channels [1, 2, 3, 4, 5, 6], and these records have [6, 5, 4," in said


def test_images_of_another_scale_are_pointed_out(records, tmp_path, capsys):
    trained(records, tmp_path, "erm", "image")
    file = tmp_path / "metrics.json"
    for images, warned in ((images_of(records), False), (images_of(records) | {"crop": 12}, True)):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"images": images}))
        run(tmp_path / "model.keras", records, "--output", tmp_path / f"{warned}.csv")
        said = capsys.readouterr().out
        assert ("WARNING: the model was trained on images of {'crop': 12, 'image_size'" in said) == warned


def test_a_damaged_record_is_a_line(records, tmp_path, monkeypatch):
    trained(records, tmp_path, "erm", "image")
    shutil.copytree(records, tmp_path / "records")
    for file in (tmp_path / "records" / "test").iterdir():
        file.write_bytes(file.read_bytes()[:-9] + bytes(9))  # the last record's checksum
    message = r"predict.py: error: .*tfrecord, record \d+: damaged.* --repair`. Then start again.$"
    arguments = [tmp_path / "model.keras", tmp_path / "records", "--output", tmp_path / "new.csv"]
    with pytest.raises(SystemExit, match=message):
        as_command("predict.py", lambda: run(*arguments))
    assert not (tmp_path / "new.csv").exists()


def test_names_are_those_of_the_training_whatever_classes_the_records_have(records, tmp_path, capsys):
    trained(records, tmp_path, "abra")
    run(tmp_path / "model.keras", records, "--output", tmp_path / "own.csv")
    own = pd.read_csv(tmp_path / "own.csv").set_index("site_id")
    table = pd.read_csv(records.parent / "screen" / "metadata.csv")
    treatment, test = table["well_type"] == "treatment", table["dataset"] == "test"
    renumbered = table["sirna_id"].where(~treatment, 11 - table["sirna_id"])
    few = test & (~treatment | (table["sirna_id"] < 7))
    unknown = test & treatment
    other = tmp_path / "other"
    shutil.copytree(records.parent / "screen", other)
    for name, rows in {
        "renumbered": table.assign(sirna_id=renumbered),
        "few": table[few],
        "unlabelled": table[test].assign(
            sirna=table["sirna"].mask(unknown), sirna_id=table["sirna_id"].astype("Int64").mask(unknown)
        ),
        "without any label": table[unknown].assign(sirna="", sirna_id=""),
    }.items():
        rows.to_csv(other / "metadata.csv", index=False)
        build_records(other, tmp_path / name)
        file = tmp_path / f"{name}.csv"
        normalization = ["--normalize", "image"] if name == "without any label" else []  # and no controls
        scores = run(tmp_path / "model.keras", tmp_path / name, "--output", file, *normalization)
        found = pd.read_csv(file).set_index("site_id")
        same = own.loc[found.index]
        assert len(found) == (28 if name == "few" else 48)
        if normalization:
            run(tmp_path / "model.keras", records, "--output", tmp_path / "same.csv", *normalization)
            same = pd.read_csv(tmp_path / "same.csv").set_index("site_id").loc[found.index]
        assert list(found["predicted_1"]) == list(same["predicted_1"]), name
        if name.endswith(("unlabelled", "label")):
            assert scores is None and "Predicted, not scored: 48 sites" in capsys.readouterr().out
        else:
            right = (same["predicted_1"] == same["sirna"]).mean()
            assert scores["splits"]["test"]["accuracy"] == pytest.approx(right)
