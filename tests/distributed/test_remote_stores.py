"""Several processes of a machine share a local copy of what an object store holds; another machine builds nothing."""

import pytest
from support.together import same, train_together

from hf_freezecache.cache.urls import LOCAL_COPIES


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 1])
def test_machine_with_more_processes_or_fewer_downloads_what_two_have_built(processes, tmp_path, monkeypatch):
    remote = tmp_path / "remote"
    config = {"points": "0:2", "codec": "fp32", "feature_cache_dir": f"file://{remote}"}
    found = {}
    for machine, count in (("first", 2), ("second", processes)):
        monkeypatch.setenv(LOCAL_COPIES, str(tmp_path / machine))
        settings = {"config": config, "arguments": {"per_device_train_batch_size": 8 // count}}
        found[machine] = train_together(tmp_path / f"run-{machine}", settings, count)
        assert all(seen["replaying"] for seen in found[machine][0])
        assert len(list((tmp_path / machine).glob("*/*/manifest.json"))) == 1
    assert [seen["built"] for seen in found["first"][0]] == [1, 1]
    assert not any(seen["built"] for seen in found["second"][0])
    assert len(list(remote.glob("*/manifest.json"))) == 1
    if processes == 2:
        assert same(*found.values())
