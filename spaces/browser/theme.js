// Light or dark, as the system asks, also when it changes.
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const apply = () => document.documentElement.classList.toggle("dark", dark.matches);
dark.addEventListener("change", apply);
apply();
