// Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
// A file opened from disk may not load modules, so main.js never runs there: this script says what to do.
if (location.protocol === "file:") {
  addEventListener("DOMContentLoaded", () => {
    const trouble = document.getElementById("trouble");
    trouble.textContent = "A browser runs no model in a page that is opened as a file; run `loopmdm web`, or put the folder on a web server.";
    trouble.hidden = false;
    document.getElementById("status").textContent = "The model cannot run.";
  });
}
