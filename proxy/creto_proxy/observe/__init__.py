"""Seeing what creto does: counters that every worker keeps, and what is made of them and of the journal.

    registry, observer        families of metrics; what a worker counts while it works, in a file others can read
    aggregate, scrape, admin  all workers' files as one, as Prometheus asks for them, over the admin listener
    consumer                  the journal as access log (access_log) and as OpenTelemetry spans (spans, otlp)
    tracecontext              the W3C trace context that comes with a request, and the one that is sent on
    view                      what `creto top` shows, from the same files

Counting happens on the request path and costs stores. Everything else is done by the controller.
"""
