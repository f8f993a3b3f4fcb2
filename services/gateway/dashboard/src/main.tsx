import { render } from "preact";
import "uplot/dist/uPlot.min.css";
import "./style.css";
import "./views.css";
import { App } from "./app";
import { connect } from "./feed";

const root = document.getElementById("app");
if (root) render(<App />, root);
void connect();
