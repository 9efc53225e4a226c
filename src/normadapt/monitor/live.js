"use strict";
// Keeps the live page up to date: an event says that there is another version, and the page asks for it when it has time.
(() => {
  const $ = (id) => document.getElementById(id);
  const page = { stream: new URLSearchParams(location.search).get("stream") || "", view: null, source: null, busy: false, wanted: false, took: 0, drawn: "", asking: "", heard: 0 };

  // -- what comes ---------------------------------------------------------------------------------------------------
  function listen() {
    if (page.source) page.source.close();
    const query = page.stream ? `?stream=${encodeURIComponent(page.stream)}` : "";
    const source = new EventSource(`events${query}`);
    page.source = source;
    source.onopen = () => { page.heard = Date.now(); link("live"); };
    source.onmessage = () => { page.heard = Date.now(); link("live"); fetchView(); };
    // The browser tries again by itself, but for an answer that is no stream (a token that is gone, a proxy's error page).
    source.onerror = () => {
      link("lost");
      if (source.readyState === EventSource.CLOSED && page.source === source) setTimeout(() => { if (page.source === source) listen(); }, 2000);
    };
  }
  function link(state) {
    const told = page.view ? `, last update ${new Date(page.at).toLocaleTimeString()}` : "";
    const text = { live: "live", lost: `not connected, trying again${told}`, waiting: "connecting" }[state];
    if ($("link").dataset.state !== state) $("link").dataset.state = state;
    if ($("link").textContent !== text) $("link").textContent = text;
  }
  // One request at a time; news that come meanwhile are one more at its end. A page that nobody sees waits.
  async function fetchView() {
    page.wanted = true;
    if (page.busy || document.hidden) return;
    page.busy = true;
    while (page.wanted && !document.hidden) {
      page.wanted = false;
      const stream = page.stream;
      try {
        const answer = await fetch(`view${stream ? `?stream=${encodeURIComponent(stream)}` : ""}`, { headers: { accept: "application/json" }, cache: "no-store" });
        if (answer.status === 401) { location.reload(); return; }
        const told = await answer.json();
        if (stream !== page.stream) { page.wanted = true; continue; }
        if (answer.ok) show(told);
        else if (answer.status === 404 && stream) follow(""); // a stream that is no more
        else problem(told.error);
      } catch (error) {
        link("lost"); // the stream of events will say when there is something again
      }
      // A browser that draws slowly asks less often.
      await new Promise((done) => setTimeout(done, Math.min(2000, 2 * page.took)));
    }
    page.busy = false;
  }

  // -- what is shown ------------------------------------------------------------------------------------------------
  function put(id, html) {
    const place = $(id);
    if (place.told === html) return false;
    place.told = html;
    const open = [...place.querySelectorAll("details")].map((part) => part.open);
    const scrolled = [...place.querySelectorAll(".scroll")].map((part) => part.scrollTop);
    place.innerHTML = html;
    place.querySelectorAll("details").forEach((part, i) => { if (open[i] != null) part.open = open[i]; });
    place.querySelectorAll(".scroll").forEach((part, i) => { part.scrollTop = scrolled[i] || 0; });
    return true;
  }
  const text = (id, words) => { if ($(id).textContent !== words) $(id).textContent = words; };
  function problem(words) {
    $("note").hidden = !words;
    text("note", words || "");
    $("figures").classList.toggle("stale", Boolean(words));
  }
  function show(view) {
    const start = performance.now();
    page.view = view;
    page.at = Date.now();
    if (!("fixed" in $("title").dataset)) { text("title", view.title); document.title = `${view.title} – normadapt`; }
    text("lead", view.lead);
    problem(view.note);
    streams(view.streams, view.stream);
    $("trial-part").hidden = !view.trial;
    put("trial", view.trial);
    text("saved", view.saved);
    buttons(view.actions);
    put("words", view.words);
    put("domains", view.domains);
    put("figures", view.figures);
    put("layers", view.layers);
    put("log-part", view.log);
    const drawn = JSON.stringify(view.data);
    if (drawn !== page.drawn) { page.drawn = drawn; figures.show(view.data); }
    page.took = performance.now() - start;
    document.body.dataset.version = view.version;
    document.body.dataset.shown = performance.timeOrigin + performance.now();
  }
  // The page stays with the stream that it showed first, until somebody chooses another.
  function streams(names, shown) {
    const select = $("stream"), sorted = [...names].sort(), told = sorted.join("\n");
    if (select.told !== told) {
      select.told = told;
      select.replaceChildren(...(sorted.length ? sorted.map((name) => new Option(name, name)) : [new Option("none yet", "")]));
      select.disabled = sorted.length < 2;
    }
    if (!page.stream && names.includes(shown)) { page.stream = shown; listen(); }
    if (select.value !== page.stream) select.value = page.stream;
  }
  function follow(stream) {
    page.stream = stream;
    const here = new URL(location.href);
    if (stream) here.searchParams.set("stream", stream); else here.searchParams.delete("stream");
    history.replaceState(null, "", here);
    listen();
  }
  $("stream").addEventListener("change", (event) => follow(event.target.value));

  // -- what can be done ---------------------------------------------------------------------------------------------
  function buttons(actions) {
    $("buttons").hidden = !actions.any;
    if (!actions.any) return;
    text("pause", actions.paused ? "Resume" : "Pause");
    $("pause").disabled = !actions.canPause && !actions.paused;
  }
  const ASK = {
    pause: () => ["Pause", "Statistics and stage stay as they are until somebody resumes; guards go on."],
    resume: () => ["Resume", "Adapting and the trial go on."],
    promote: (a) => [`Promote to ${a.promote}`, a.missing ? `The stage is not complete: ${a.missing}.` : "Your word takes the place of labels."],
    rollback: () => ["Roll back", "That snapshot answers the adapted model’s share, at once, until an operator says more. Nothing is deleted."],
  };
  function ask(action) {
    const actions = page.view.actions, [title, words] = ASK[action](actions);
    page.asking = action;
    text("ask-title", title);
    text("ask-text", words);
    text("confirm", title);
    $("confirm").className = action === "rollback" ? "danger" : "";
    $("ask-problem").hidden = true;
    const back = action === "rollback";
    $("to-field").hidden = $("reason-field").hidden = !back;
    $("force-field").hidden = action !== "promote" || !actions.missing;
    $("force").checked = false;
    if (back) $("to").replaceChildren(new Option("the last good one", ""), ...actions.snapshots.map(([number, told]) => new Option(told, number)));
    $("reason").value = "";
    $("by").value = localStorage.getItem("normadapt-name") || "";
    $("confirm").disabled = false;
    $("ask").showModal();
    ($("by").value ? (back ? $("to") : $("confirm")) : $("by")).focus();
  }
  async function confirm(event) {
    event.preventDefault();
    const action = page.asking, by = $("by").value.trim();
    if (!by) { $("by").focus(); return; }
    localStorage.setItem("normadapt-name", by);
    const told = { by };
    if (action === "rollback") Object.assign(told, { to: $("to").value ? Number($("to").value) : null, reason: $("reason").value });
    if (action === "promote") told.force = $("force").checked;
    $("confirm").disabled = true;
    let words = "";
    try {
      const answer = await fetch(`actions/${action}`, { method: "POST", headers: { "content-type": "application/json", "x-normadapt-csrf": page.view.csrf }, body: JSON.stringify(told) });
      const said = await answer.json();
      if (answer.ok) { text("done", said.done); $("ask").close(); fetchView(); return; }
      words = said.error;
    } catch (error) {
      words = "The server cannot be reached; nothing is known of what became of it.";
    }
    $("confirm").disabled = false;
    $("ask-problem").hidden = false;
    text("ask-problem", words);
  }
  $("pause").addEventListener("click", () => ask(page.view.actions.paused ? "resume" : "pause"));
  $("promote").addEventListener("click", () => ask("promote"));
  $("rollback").addEventListener("click", () => ask("rollback"));
  $("cancel").addEventListener("click", () => $("ask").close());
  $("ask-form").addEventListener("submit", confirm);

  document.addEventListener("visibilitychange", () => { if (!document.hidden) fetchView(); });
  addEventListener("pagehide", () => page.source && page.source.close());
  addEventListener("pageshow", (event) => { if (event.persisted) listen(); });
  listen();
})();
