"""The tests of wangpd: through real sockets and real processes wherever that is what a promise is about."""
