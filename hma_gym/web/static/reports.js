import { $, ask, element, notice, table } from "./common.js";

const percent = (share) => (share === null ? "–" : `${(100 * share).toFixed(1)}%`);
const kappa = (value) => (value === null ? "–" : value.toFixed(2));

function showReports(reports) {
  if (!reports.length) {
    $("reports").append(element("p", { class: "dim" }, "No report.html below the data folder yet. hma-gym demo writes one."));
    return;
  }
  const rows = reports.map((report) => [
    element("a", { href: `/reports/${report.id}/report.html` }, report.title || report.name),
    report.name,
    new Date(1000 * report.modified).toLocaleString([], { dateStyle: "medium", timeStyle: "short" }),
  ]);
  $("reports").append(table(["Report", "Folder", "Written"], rows));
}

function showQueues(queues) {
  if (!queues.length) {
    $("queues").append(element("p", { class: "dim" }, "No label queues yet."));
    return;
  }
  for (const queue of queues.filter((one) => one.error)) {
    $("queues").append(element("p", { class: "notice" }, `${queue.name}: ${queue.error}`));
  }
  const readable = queues.filter((one) => !one.error);
  if (!readable.length) return;
  const rows = readable.map((queue) => [queue.name, `${queue.complete} of ${queue.items}`, queue.success, queue.failure, queue.complete ? percent(queue.success / Math.max(1, queue.success + queue.failure)) : "–", kappa(queue.fleiss)]);
  $("queues").append(table(["Queue", "Complete", "Success", "Failure", "Success rate", "Fleiss' kappa"], rows));
  for (const queue of readable) showAgreement(queue);
}

function showAgreement(queue) {
  const people = Object.entries(queue.annotators);
  if (!people.length) return;
  const box = element("div", {}, element("h2", {}, queue.name), element("p", { class: "small dim" }, people.map(([name, count]) => `${name}: ${count}`).join(" · ")));
  if (queue.pairs.length) {
    box.append(element("div", { class: "scroll" }, table(["People", "Videos in common", "Same verdict", "Cohen's kappa"], queue.pairs.map((pair) => [pair.names.join(" and "), pair.items, percent(pair.agreement), kappa(pair.kappa)]))));
  }
  if (queue.confusions.length) {
    box.append(element("div", { class: "scroll" }, table(["Machine", "Same verdict", "Both success", "People only", "Machine only", "Both failure"], queue.confusions.map((one) => [one.machine, percent(one.agreement), one.both_success, one.only_people, one.only_machine, one.both_failure]))));
  }
  $("agreement").append(box);
}

try {
  const [reports, queues] = await Promise.all([ask("/api/reports"), ask("/api/queues")]);
  showReports(reports);
  showQueues(queues);
} catch (error) {
  notice(error.message);
}
