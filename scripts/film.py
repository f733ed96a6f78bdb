"""One run as a GIF, an MP4 or a picture: `llmsched film`."""

import sys

from llmsched_env.cli import main

if __name__ == "__main__":
    sys.exit(main(["film", *sys.argv[1:]]))
