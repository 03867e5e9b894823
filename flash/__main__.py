"""`python -m flash`: what this machine serves."""

import json

from . import info

if __name__ == "__main__":
    print(json.dumps(info(), indent=2))
