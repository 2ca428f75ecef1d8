"""A client of the package that openapi-python-client made: submits a prompt, waits for the end, downloads the file.

With a picture, as a form.
"""

import io
import json
import sys
from pathlib import Path

from wangpd_client import Client
from wangpd_client.api.generation import generate
from wangpd_client.api.output_files import download
from wangpd_client.api.queue import task_status
from wangpd_client.models import GenerateForm, GenerateRequest, SubmittedAnswer, TaskStateAnswer
from wangpd_client.types import File

base_url, prompt, *pictures = sys.argv[1:]
body: GenerateRequest | GenerateForm = GenerateRequest(prompt=prompt)
for picture in pictures:
    body = GenerateForm(prompt=prompt, image_start=File(io.BytesIO(Path(picture).read_bytes()), picture, "image/png"))
with Client(base_url=base_url) as client:
    submitted = generate.sync(client=client, body=body)
    assert isinstance(submitted, SubmittedAnswer), submitted
    task_id = submitted.data.task_id
    status = ""
    while status not in ("completed", "failed", "cancelled"):
        answer = task_status.sync(task_id, client=client, wait=60)
        assert isinstance(answer, TaskStateAnswer), answer
        status = answer.data.status
    film = download.sync(answer.data.files[0].filename, client=client)
    assert isinstance(film, File), film
    size = len(film.payload.read())
print(json.dumps({"task_id": task_id, "warnings": submitted.data.warnings, "bytes": size}))
