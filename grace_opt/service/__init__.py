"""The solver service: HTTP API, durable runs, pages (docs/service.md). `app.create_app` makes it."""
