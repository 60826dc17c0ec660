from tests.robotwin_eval.conftest import classic, policy_path, runner

__all__ = ["classic", "policy_path", "runner"]
