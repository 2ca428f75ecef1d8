// A client of the types that openapi-typescript made: submits a prompt, waits for the end, and downloads the file.
import createClient from "openapi-fetch";
import type { paths } from "./schema.js";

declare const process: { argv: string[] };

const [baseUrl, prompt] = process.argv.slice(2);
const client = createClient<paths>({ baseUrl });

function answered<Data>(answer: { data?: Data; error?: { detail: string } }): Data {
  if (answer.data === undefined) throw new Error(answer.error?.detail);
  return answer.data;
}

const submitted = answered(await client.POST("/api/v1/generate", { body: { prompt } }));
const taskId: number = submitted.data.task_id!;
let task;
do {
  const params = { path: { task_id: taskId }, query: { wait: 60 } };
  task = answered(await client.GET("/api/v1/status/{task_id}", { params })).data;
} while (!["completed", "failed", "cancelled"].includes(task.status));
const params = { path: { filename: task.files[0].filename } };
const film = await client.GET("/api/v1/download/{filename}", { params, parseAs: "arrayBuffer" });
if (film.data === undefined) throw new Error(film.error?.detail);
console.log(JSON.stringify({ task_id: taskId, warnings: submitted.data.warnings, bytes: film.data.byteLength }));
