"""What every test needs."""

import pytest

from apportion.engine import launcher


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory):
    """Runs store what they measured per user: tests neither read nor write that of the person who runs them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def one_forkserver():
    """All tests of a session share one, which is of use to every family."""
    with pytest.MonkeyPatch.context() as patch:
        modules = ["apportion.engine.worker", "apportion.model.hf.build"]
        patch.setattr(launcher, "worker_modules", lambda *_: modules)
        yield
