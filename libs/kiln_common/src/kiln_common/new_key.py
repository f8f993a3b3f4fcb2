"""`python -m kiln_common.new_key NAME --scopes infer,train`: a new key, and its entry for a keys file.

The key is shown once, on standard error; the entry, which has only its hash, goes to standard output.
"""

from __future__ import annotations

import argparse
import json
import secrets
import sys

from kiln_common.api_keys import ApiKey, digest_of


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kiln_common.new_key", description=__doc__)
    parser.add_argument("name", help="whose key it is; keys of one name share what is theirs")
    parser.add_argument("--scopes", default="infer", help="infer, train, admin; comma separated")
    options = parser.parse_args()
    key = f"kiln-{secrets.token_urlsafe(32)}"
    entry = {"name": options.name, "sha256": digest_of(key), "scopes": options.scopes.split(",")}
    ApiKey.model_validate(entry)
    print(key, file=sys.stderr)
    print(json.dumps(entry))


if __name__ == "__main__":
    main()
