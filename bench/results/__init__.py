"""Results that are shared: a store of Parquet files, what is put into it and how it is shown."""
