import { $, ask, notice } from "./common.js";

try {
  const [queues, reports] = await Promise.all([ask("/api/queues"), ask("/api/reports")]);
  const readable = queues.filter((queue) => !queue.error);
  const left = readable.reduce((sum, queue) => sum + queue.items - queue.complete, 0);
  $("queues").textContent = readable.length ? `${left} videos wait in ${readable.length} ${readable.length === 1 ? "queue" : "queues"}.` : "No videos wait.";
  $("reports").textContent = reports.length ? `${reports.length} ${reports.length === 1 ? "report" : "reports"}.` : "No reports yet.";
} catch (error) {
  notice(error.message);
}
