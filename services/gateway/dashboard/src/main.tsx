import { render } from "preact";
import "uplot/dist/uPlot.min.css";
import "./style/base.css";
import "./style/parts.css";
import "./style/forms.css";
import "./style/frame.css";
import "./style/live.css";
import "./style/playground.css";
import "./style/lists.css";
import "./style/narrow.css";
import { App } from "./app";
import { connect } from "./feed";

const root = document.getElementById("app");
if (root) render(<App />, root);
void connect();
