"""What other programs make of croissant.json: mlcroissant, rdflib and TensorFlow Datasets."""

import sys
from pathlib import Path

import mlcroissant as mlc
import numpy as np
import pandas as pd
import pytest
import rdflib
from conftest import describe, description_of, finish, start
from mlcroissant._src import datasets
from rdflib.namespace import RDF

from generate_croissant import INDEX_COLUMNS

CROISSANT = rdflib.Namespace("http://mlcommons.org/croissant/")
RAI = rdflib.Namespace("http://mlcommons.org/croissant/RAI/")
PROV = rdflib.Namespace("http://www.w3.org/ns/prov#")
SCHEMA = rdflib.Namespace("https://schema.org/")
SCHEMA_TERMS = set(  # that are used; a term of Croissant among them would lack its context
    "contentSize contentUrl creator dateCreated dateModified datePublished description distribution"
    " email encodingFormat inLanguage keywords license name publisher sameAs sdLicense sha256"
    " softwareVersion url version".split()
)


@pytest.fixture
def complete(dataset, everything) -> Path:
    assert describe(dataset, *everything, "--image_sha256") == 0
    return dataset


@pytest.fixture
def published(dataset, everything) -> Path:
    options = "--image_sha256", "--base_url", "https://example.invalid/mini"
    assert describe(dataset, *everything, *options) == 0
    return dataset


@pytest.fixture
def graph(complete) -> rdflib.Graph:
    return rdflib.Graph().parse(complete / "croissant.json", format="json-ld")


def records(dataset: Path, record_set: str) -> list[dict]:
    read = mlc.Dataset(dataset / "croissant.json").records(record_set)
    return [
        {key.split("/")[1]: v.decode() if isinstance(v, bytes) else v for key, v in record.items()}
        for record in read
    ]


def validate(dataset: Path) -> str:
    validator = Path(sys.executable).with_name("mlcroissant")
    done = finish(start(validator, "validate", "--jsonld", dataset / "croissant.json"))
    assert done.code == 0, done.err
    return done.err


@pytest.mark.parametrize("described_as", ["complete", "published"])
def test_mlcroissant_has_nothing_to_say_if_everything_is_given(described_as, request):
    (line,) = validate(request.getfixturevalue(described_as)).splitlines()
    assert line.endswith("] Done.")


def test_a_published_description_is_read_from_local_files_without_a_download(published):
    mapping = {"master-index": published / "master_index.csv"}
    loaded = mlc.Dataset(published / "croissant.json", mapping=mapping)
    sets = loaded.metadata.record_sets
    assert {one.id: len(list(loaded.records(one.id))) for one in sets} == {
        "transient_candidates": 48,
        "labels": 2,
        "images": 4,
    }


def test_the_graph_says_in_which_folder_the_tensors_are(published):
    graph = rdflib.Graph().parse(published / "croissant.json", format="json-ld")
    (tensors,) = graph.subjects(RDF.type, CROISSANT.FileSet)
    folder = graph.value(tensors, CROISSANT.containedIn)
    assert str(graph.value(folder, SCHEMA.contentUrl)) == "https://example.invalid/mini"


def test_mlcroissant_misses_only_what_nobody_gave(described):
    text = validate(described)
    assert "error(s)" not in text
    assert text.count("is recommended, but does not exist") == 4
    for term in ("citeAs", "datePublished", "license", "version"):
        assert f'/{term}" is recommended' in text


def test_every_candidate_is_the_row_of_the_index(complete):
    index = pd.read_csv(complete / "master_index.csv")
    read = pd.DataFrame(records(complete, "transient_candidates"))[list(INDEX_COLUMNS)]
    pd.testing.assert_frame_equal(read.astype(index.dtypes), index, check_exact=True)
    assert read["mag"].isna().any()


def test_the_other_record_sets_read_too(complete):
    labels = {record["label"]: record["name"] for record in records(complete, "labels")}
    assert labels == {0: "bogus", 1: "real"}
    images = records(complete, "images")
    assert [image["jid"] for image in images] == ["jid001", "jid002", "jid003", "jid004"]
    assert {(image["height"], image["width"]) for image in images} == {(72, 80)}
    assert {len(image["sha256"]) for image in images} == {64}


def test_candidates_stream(complete, monkeypatch):
    def read_all(*arguments, **options):
        pytest.fail("mlcroissant reads the index whole before it gives the first record")

    monkeypatch.setattr(datasets, "execute_operations_sequentially", read_all)
    assert next(iter(mlc.Dataset(complete / "croissant.json").records("transient_candidates")))


def test_every_key_of_the_json_is_a_triple_of_a_known_vocabulary(graph):
    vocabularies = (CROISSANT, RAI, PROV, SCHEMA, rdflib.Namespace("http://purl.org/dc/terms/"))
    predicates = set(graph.predicates()) - {RDF.type}
    for predicate in predicates:
        assert any(predicate.startswith(one) for one in vocabularies), predicate
    used = {str(one).removeprefix(SCHEMA) for one in predicates if one.startswith(SCHEMA)}
    assert used == SCHEMA_TERMS


def test_the_graph_says_what_was_given(graph):
    (dataset,) = graph.subjects(RDF.type, SCHEMA.Dataset)
    assert {str(one) for one in graph.objects(dataset, RAI.dataCollectionTimeframe)} == {
        "2026-10-01",
        "2026-10-31",
    }
    assert str(graph.value(dataset, RAI.dataManipulationProtocol)) == "Nothing was left out."
    assert graph.value(dataset, RAI.hasSyntheticData).toPython() is True
    source = graph.value(dataset, PROV.wasDerivedFrom)
    assert source == rdflib.URIRef("https://example.org/raw")
    activity = graph.value(dataset, PROV.wasGeneratedBy)
    assert graph.value(activity, RDF.type) == PROV.Activity
    assert {
        str(graph.value(one, SCHEMA.name)) for one in graph.objects(dataset, SCHEMA.creator)
    } == {
        "Ada Lovelace",
        "Example Observatory",
    }


def test_the_graph_describes_the_tensor(graph):
    (tensor,) = graph.subjects(CROISSANT.isArray, None)
    assert str(graph.value(tensor, CROISSANT.arrayShape)) == "72,80,4"
    assert graph.value(tensor, CROISSANT.dataType) == CROISSANT.Float32
    (field,) = graph.subjects(CROISSANT.annotation, tensor)
    assert str(graph.value(field, SCHEMA.name)) == "image_filename"
    (label,) = graph.subjects(CROISSANT.dataType, CROISSANT.Label)
    assert str(graph.value(label, SCHEMA.name)) == "label"


@pytest.mark.tfds
def test_tensorflow_datasets_reads_the_candidates(complete, tmp_path):
    """Needs `pip install tensorflow-cpu tensorflow-datasets apache-beam importlib_resources`."""
    builders = pytest.importorskip("tensorflow_datasets").core.dataset_builders
    pytest.importorskip("apache_beam")
    builder = builders.CroissantBuilder(
        jsonld=complete / "croissant.json",
        record_set_ids=["transient_candidates"],
        file_format="array_record",
        data_dir=tmp_path,
        disable_shuffling=True,
    )
    builder.download_and_prepare()
    source = builder.as_data_source(split="default")
    read = pd.DataFrame([source[number] for number in range(len(source))])
    read = read.map(lambda value: value.decode() if isinstance(value, bytes) else value)
    index = pd.read_csv(complete / "master_index.csv")
    read = read[list(INDEX_COLUMNS)].sort_values(["jid", "id"], ignore_index=True)
    expected = index.sort_values(["jid", "id"], ignore_index=True)
    # TensorFlow Datasets passes float64 through float32, and makes an empty cell -inf.
    assert expected["mag"].isna().any()
    expected = expected.fillna({"mag": -np.inf})
    pd.testing.assert_frame_equal(read, expected, check_dtype=False, rtol=1e-6)
    assert builder.info.citation == description_of(complete)["citeAs"]
