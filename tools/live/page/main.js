import { Client } from "./client.js";
const text = (id) => document.getElementById(id).textContent;
const client = new Client(text("worker"));
globalThis.live = client;
