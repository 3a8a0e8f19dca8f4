import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the slow tests too")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))


@pytest.fixture(scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Scans of images are kept in a folder of the tests' own, also by the commands that they start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FITFORMER_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
