"""What the tests of judging share."""

from tests.chat_server import judge_server, quick_retries

__all__ = ["judge_server", "quick_retries"]
