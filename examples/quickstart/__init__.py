"""A quickstart on a real simulator, without a GPU and without the Hub: see `__main__`."""

import logging

# Where FFmpeg is missing LeRobot warns by the page that video decoding is slower; nothing here is video.
logging.getLogger("lerobot.utils.import_utils").setLevel(logging.ERROR)
