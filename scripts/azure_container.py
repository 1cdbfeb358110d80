"""Makes a container in Azurite, the emulator of Azure's store: azure_container.py URL NAME."""

import base64
import hashlib
import hmac
import sys
import urllib.request
from email.utils import formatdate

# Everybody knows them: the emulator's documentation has them.
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
VERSION = "2021-08-06"

url, container = sys.argv[1:]
date = formatdate(usegmt=True)
# The method; eleven headers that are not there; those of Azure; the path, with the account twice,
# as the emulator has it; the query.
signed = "\n".join(
    [
        "PUT",
        *[""] * 11,
        f"x-ms-date:{date}",
        f"x-ms-version:{VERSION}",
        f"/{ACCOUNT}/{ACCOUNT}/{container}",
        "restype:container",
    ]
)
digest = hmac.digest(base64.b64decode(KEY), signed.encode(), hashlib.sha256)
headers = {
    "x-ms-date": date,
    "x-ms-version": VERSION,
    "Authorization": f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}",
}
path = f"{url}/{ACCOUNT}/{container}?restype=container"
urllib.request.urlopen(urllib.request.Request(path, method="PUT", headers=headers)).close()
