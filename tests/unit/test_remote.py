"""OME-Zarr images in a bucket: read and divided as from a folder, and what goes wrong in a line."""

import sys

import fsspec
import numpy as np
import pytest

from n4flow.errors import InputError, MachineError
from n4flow.images import remote
from n4flow.images.arrays import open_level, read_coarse
from n4flow.images.ngff import choose_coarse, read_image
from n4flow.steps.pyramid import plan_store
from n4flow.steps.store import correct_store
from n4flow.study.bids import Scan
from n4flow.study.stores import check_write_to, image_of_store, metadata_digest, stores_of
from tests.buckets import put, server
from tests.pyramids import binned, sheet_volume, write_store

pytestmark = pytest.mark.usefixtures("server")

__all__ = ["server"]

VALUES = np.rint(sheet_volume()[0]).astype(np.uint16)
LEVELS = [VALUES, np.rint(binned(VALUES)).astype(np.uint16)]
LAYOUTS = {
    "v2": {"version": "0.4"},
    "v3": {},
    "sharded": {"shards": (32, 64, 64)},
}
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def stored(folder, layout):
    """A store on this machine, and its copy in the bucket."""
    here = write_store(folder / "in.ome.zarr", LEVELS, **LAYOUTS[layout])
    there = f"s3://bucket/{layout}/in.ome.zarr"
    put(here, there)
    return here, there


@layouts
def test_metadata_and_voxels_are_those_of_the_folder(tmp_path, layout):
    here, there = (read_image(path) for path in stored(tmp_path, layout))
    assert (there.levels, there.attributes, there.version) == (here.levels, here.attributes, here.version)
    assert there.digest == here.digest
    for level, values in zip(there.levels, LEVELS, strict=True):
        np.testing.assert_array_equal(open_level(there, level)[...], values)
    chosen = choose_coarse(here, 1, 10**6)
    volumes = [read_coarse(image, image.levels[1], chosen.factors, 0, None, "auto") for image in (here, there)]
    np.testing.assert_array_equal(volumes[0][0], volumes[1][0])
    assert volumes[0][1:] == volumes[1][1:]


@pytest.mark.parametrize("layout", ["v2", "sharded"])
def test_a_store_is_corrected_to_the_same_voxels(tmp_path, layout):
    here, there = stored(tmp_path, layout)
    for source, name in ((here, "of_folder"), (there, "of_bucket")):
        correct_store(source, tmp_path / f"{name}.ome.zarr", threads=2)
    first, second = (read_image(tmp_path / f"{name}.ome.zarr") for name in ("of_folder", "of_bucket"))
    for level in first.levels:
        np.testing.assert_array_equal(open_level(first, level)[...], open_level(second, level)[...])
    assert there in (tmp_path / "of_bucket.json").read_text()


@layouts
def test_planning_takes_a_request_for_each_file_of_metadata(tmp_path, server, layout):
    _, there = stored(tmp_path, layout)
    before = len(server.requests())
    read_image(there)
    roots, levels = 2, 2
    assert len(server.requests(before)) == roots + levels


def test_a_unit_is_read_with_one_request(tmp_path, server):
    _, there = stored(tmp_path, "sharded")
    image = read_image(there)
    array = open_level(image, image.levels[0])
    before = len(server.requests())
    np.testing.assert_array_equal(array[:32, :64, :64], VALUES[:32, :64, :64])
    assert len(server.requests(before)) == 1


def test_what_is_not_there_is_a_line():
    with pytest.raises(InputError, match=r"holds neither zarr.json nor .zattrs.*check the path"):
        read_image("s3://bucket/none.ome.zarr")


def test_without_credentials_a_line_says_what_to_give(monkeypatch, tmp_path):
    monkeypatch.setattr(fsspec.filesystem("s3"), "_cache", {}, raising=False)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    fsspec.filesystem("s3").clear_instance_cache()
    with pytest.raises(MachineError, match=r"may not be read \(NoCredentials.*FSSPEC_S3_ANON=true"):
        read_image("s3://bucket/in.ome.zarr")
    fsspec.filesystem("s3").clear_instance_cache()


@pytest.mark.parametrize("address", ["s3://bucket/v3/in.ome.zarr", "http://127.0.0.1:9/in.ome.zarr"])
def test_a_server_that_does_not_answer_is_a_line(server, address):
    server.say("stop")
    try:
        with pytest.raises(MachineError, match=r"cannot be read \(.*check the network"):
            read_image(address)
    finally:
        server.say("start")


def test_voxels_that_cannot_be_reached_are_no_fill_values(tmp_path, server):
    _, there = stored(tmp_path, "v3")
    image = read_image(there)
    array = open_level(image, image.levels[0])
    assert array[0, 0, 0] == VALUES[0, 0, 0]
    server.say("stop")
    try:
        with pytest.raises(MachineError, match="check the network"):
            read_coarse(image, image.levels[0], (1, 1, 1), 0, None, 0)
    finally:
        server.say("start")


def test_without_network_a_run_does_not_ask_for_each_store(server, monkeypatch):
    scans = [Scan(str(number), "", "SPIM", f"s3://bucket/{number}.ome.zarr") for number in range(3)]
    server.say("stop")
    try:
        with pytest.raises(MachineError) as raised:
            stores_of(scans, "auto", "error")
    finally:
        server.say("start")
    assert len(str(raised.value).splitlines()) == 1


def test_without_the_package_a_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(MachineError, match=r"a package for it is missing.*install envs/requirements-remote.txt"):
        read_image("s3://bucket/in.ome.zarr")


def test_an_unknown_kind_of_address_is_a_line():
    with pytest.raises(InputError, match="is no address that is known"):
        read_image("nowhere://bucket/in.ome.zarr")


def test_where_nothing_may_be_listed_what_is_not_there_is_forbidden(monkeypatch):
    class Bucket:
        def cat_file(self, address):
            if address.endswith(".zattrs"):
                return b"{}"
            raise PermissionError("Forbidden")

    monkeypatch.setattr(remote, "_file_system", lambda address: Bucket())
    assert remote.read_all(["s3://b/zarr.json", "s3://b/.zattrs"]) == {
        "s3://b/zarr.json": None,
        "s3://b/.zattrs": b"{}",
    }
    found = remote.read_all(["s3://b/zarr.json"])["s3://b/zarr.json"]
    assert isinstance(found, MachineError)
    assert "give credentials" in str(found)


def test_a_zip_file_is_not_read_from_a_bucket():
    with pytest.raises(InputError, match="is a zip file that does not lie on this machine"):
        read_image("s3://bucket/in.ozx")


def test_nothing_is_written_to_an_address_by_the_command(tmp_path):
    with pytest.raises(InputError, match="does not lie on this machine"):
        correct_store(tmp_path / "in.ome.zarr", "s3://results/out.ome.zarr")


def test_an_image_that_goes_in_is_not_written_over(tmp_path):
    _, there = stored(tmp_path, "v3")
    with pytest.raises(InputError, match=r"holds s3://bucket/v3/in\.ome\.zarr, which goes in"):
        check_write_to("s3://bucket/v3", [read_image(there)])
    check_write_to("s3://bucket/v", [read_image(there)])


def test_a_bucket_that_is_not_there_is_a_line_when_it_is_written_to():
    with pytest.raises(MachineError, match=r"cannot be written \(.*check the name of the bucket"):
        remote.write("s3://no-such-bucket/zarr.json", b"{}")


def test_the_digest_of_metadata_is_of_what_does_not_lie_here(tmp_path):
    here, there = stored(tmp_path, "v3")
    assert metadata_digest(str(here), "auto") == ""
    assert metadata_digest(there, "auto") == read_image(here).digest
    assert metadata_digest("s3://bucket/none.ome.zarr", "auto") == ""


def test_another_studys_store_in_the_bucket_is_refused_and_stays(tmp_path):
    here, _ = stored(tmp_path, "v3")
    target = "s3://results/shared/out.ome.zarr"
    settings = {"job_gb": 1, "dtype": "same", "pyramid_origin": "auto"}
    plans = [tmp_path / study / "plan.json" for study in "ab"]
    for plan in plans:
        plan.parent.mkdir()
    plan_store(here, target, plans[0], **settings)
    remote.write(f"{target}/zarr.json", b"{}")
    with pytest.raises(InputError, match=r"is there, and not of this results folder.*another folder for each study"):
        plan_store(here, target, plans[1], **settings)
    assert "zarr.json" in remote.names_in(target)
    plan_store(here, target, plans[0], **settings)  # its own is planned again
    assert "zarr.json" not in remote.names_in(target)
    foreign = "s3://results/foreign/out.ome.zarr"
    remote.write(f"{foreign}/0/zarr.json", b"{}")
    with pytest.raises(InputError, match="is there, and not of this results folder"):
        plan_store(here, foreign, plans[0], **settings)


@pytest.mark.parametrize("change", [{"dtype": "float32"}, {"levels": LEVELS[:1]}, {"version": "0.4"}])
def test_nothing_is_left_in_the_bucket_of_another_plan_but_labels(tmp_path, change):
    target, plan = f"s3://results/{next(iter(change))}/out.ome.zarr", tmp_path / "plan.json"
    settings = {"job_gb": 1, "dtype": "same", "pyramid_origin": "auto"}
    plan_store(write_store(tmp_path / "old.ome.zarr", LEVELS), target, plan, **settings)
    remote.write(f"{target}/labels/brain/zarr.json", b"{}")
    remote.write(f"{target}/1/c/0/0/0", b"old")
    settings["dtype"] = change.pop("dtype", "same")
    plan_store(write_store(tmp_path / "new.ome.zarr", change.pop("levels", LEVELS), **change), target, plan, **settings)
    assert "brain" in remote.names_in(f"{target}/labels")
    assert "c" not in remote.names_in(f"{target}/1")


def test_no_user_is_named_in_an_address():
    with pytest.raises(InputError, match="has a user's name in its address") as raised:
        read_image("https://ann:secret@host/in.ome.zarr")
    assert "secret" not in str(raised.value)
    assert "ann" not in str(raised.value)


def test_a_bucket_that_is_not_there_is_a_line_when_it_is_read():
    with pytest.raises(MachineError, match="check the name of the bucket"):
        read_image("s3://no-such-bucket/in.ome.zarr")


def test_a_digest_does_not_change_where_the_store_cannot_be_reached(tmp_path, server):
    _, there = stored(tmp_path, "v3")
    image_of_store.cache_clear()
    server.say("stop")
    try:
        with pytest.raises(MachineError):
            metadata_digest(there, "auto")
    finally:
        server.say("start")
