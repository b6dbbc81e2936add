"""The demo's data and tiny models: real scans of handwritten digits and questions about them."""
