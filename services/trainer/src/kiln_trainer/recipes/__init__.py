"""What a job teaches: each recipe turns a request into documents whose streams say it token by token."""
